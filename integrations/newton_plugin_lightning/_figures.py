"""Two pictures of a step for the Trainer's loggers: the eigenvalues of C, and the sizes of the samples' gradients.

matplotlib is imported where the first picture is drawn, without pyplot: no window, no state that others share.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from newton_plugin_lightning._eigenvalues import eigenvalues

__all__ = ["Figures"]


class Figures:
    """Draws what a hook's ``last_steps`` show, into the loggers that take figures.

    Args:
        trainer: whose loggers, and its rank.

    A missing matplotlib, and loggers that take no figures, are named once, where this is made.
    """

    def __init__(self, trainer: Any) -> None:
        self._sends: list[Callable[[str, Any, int], None]] = []
        if not trainer.is_global_zero:
            return
        if importlib.util.find_spec("matplotlib") is None:
            _warn("log_figures_every_n_steps draws with matplotlib, which is not installed: pip install matplotlib.")
            return
        senders = {type(logger).__name__: _sender(logger) for logger in trainer.loggers}
        without = [name for name, send in senders.items() if send is None]
        if without or not senders:
            who = f"{' and '.join(without)} takes no figures" if senders else "the Trainer has no logger"
            _warn(f"log_figures_every_n_steps: {who}. They go to TensorBoardLogger and WandbLogger.")
        self._sends = [send for logger in trainer.loggers if (send := _sender(logger)) is not None]

    def draw(self, last_steps: Sequence[Any], step: int) -> None:
        """Draw one figure for each boundary. Waits for the device."""
        for last in last_steps if self._sends else ():
            figure = _figure(last, step)
            tag = "newton/figures" if len(last_steps) == 1 else f"newton/figures/{last.name}"
            for send in self._sends:
                send(tag, figure, step)


def _warn(message: str) -> None:
    warnings.warn(f"NewtonLosses: {message}", UserWarning, stacklevel=4)


def _sender(logger: Any) -> Callable[[str, Any, int], None] | None:
    """How a logger of Lightning gets a figure; None: it takes none."""
    if hasattr(logger, "log_image"):  # W&B, which takes arrays
        return lambda tag, figure, step: logger.log_image(tag, [_pixels(figure)], step=step)
    if hasattr(logger.experiment, "add_figure"):  # TensorBoard
        return lambda tag, figure, step: logger.experiment.add_figure(tag, figure, step, close=False)
    return None


def _pixels(figure: Any) -> Any:
    """(height, width, 3), bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from numpy import asarray

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return asarray(canvas.buffer_rgba())[..., :3].copy()


def _figure(last: Any, step: int) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.suptitle(f"{last.name}, after {step} optimizer steps")
    left, right = figure.subplots(1, 2)
    _draw_eigenvalues(left, last)
    _draw_sizes(right, last)
    return figure


def _draw_eigenvalues(axes: Any, last: Any) -> None:
    """C's own, and those of the batch's second moment, of which an isotropic C is the mean."""
    drawn = False
    for values, name, style in ((_of_c(last), "C", "o-"), (_of_moment(last), "this batch's gradients", ".:")):
        zero = 1e-9 * values.abs().max() if len(values) else 0.0
        positive, negative = values[values > zero].flip(0), int((values < -zero).sum())
        label = f"{name}, {negative} negative" if negative else name
        if len(positive) == 1 and name == "C":
            axes.axhline(float(positive[0]), label=f"{label}: one number", color="black", linewidth=1)
        elif len(positive):
            label = f"{label}, spread {last.spread_of(positive):.2g}"
            axes.plot(range(1, len(positive) + 1), positive, style, markersize=4, label=label)
        drawn = drawn or len(positive) > 0
    axes.set(xlabel="number, the largest first", title="eigenvalues" if drawn else "eigenvalues: not known here")
    if drawn:
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize="small")


def _of_c(last: Any) -> torch.Tensor:
    """The eigenvalues of the C that was used, ascending; of several matrices all together; none: it was not formed."""
    c = last.curvature
    if c is None or c.numel() > 2**20:
        return torch.empty(0)
    if c.ndim < 2:
        return c.detach().cpu().double().reshape(-1).sort().values
    return eigenvalues(c).reshape(-1).sort().values


def _of_moment(last: Any) -> torch.Tensor:
    moment = last.second_moment
    return torch.empty(0) if moment is None else eigenvalues(moment)


def _draw_sizes(axes: Any, last: Any) -> None:
    """From the largest to the smallest, the tenth that is the tail apart."""
    sizes = torch.empty(0) if last.sizes is None else last.sizes.detach().cpu().double().sort(descending=True).values
    sizes = sizes[sizes > 0]
    axes.set(xlabel="sample, the largest first", title="sizes |g| of the samples' gradients")
    if not len(sizes):
        axes.set_title("sizes of gradients: not kept, or zero")
        return
    places, tenth = range(1, len(sizes) + 1), len(sizes) // 10
    axes.plot(places, sizes, color="C0", linewidth=1)
    axes.fill_between(places[:tenth], sizes[:tenth], sizes.min(), alpha=0.4, label=f"tail {float(last.tail):.2f}")
    axes.set_yscale("log")
    if tenth:
        axes.legend(frameon=False, fontsize="small")
