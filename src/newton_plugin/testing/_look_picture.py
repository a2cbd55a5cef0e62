"""Three pictures of a look, into a figure that the caller made: no plotting library is imported here."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from newton_plugin.testing._watching import Watched

__all__ = ["draw"]


def draw(figure: Any, name: str, watched: Watched, sizes: Tensor | None, errors: Tensor | None) -> None:
    """Draw eigenvalues over steps, sizes of gradients, and errors of float32.

    Args:
        figure: an empty ``matplotlib.figure.Figure``.
        name: of the boundary.
        watched: its steps.
        sizes, errors: (N,), of the samples' gradients in float64 and of those in float32 against them; None: unknown.
    """
    left, middle, right = figure.subplots(1, 3)
    _draw_eigenvalues(left, watched)
    _draw_sizes(middle, watched)
    _draw_errors(right, sizes, errors)
    figure.suptitle(f"Gradients at {name!r}, {len(watched)} plain steps")
    figure.set_layout_engine("constrained")


def _draw_eigenvalues(axes: Any, watched: Watched) -> None:
    axes.set(title="eigenvalues of C = mean gg'", xlabel="step")
    at, values = [], []
    for step, found in enumerate(watched.eigenvalues()):
        positive = found[found > 1e-9 * found.max()].tolist() if len(found) else []
        at += [step] * len(positive)
        values += positive
    if values:
        axes.semilogy(at, values, ".", markersize=3)


def _draw_sizes(axes: Any, watched: Watched) -> None:
    axes.set(title="sizes of the gradients", xlabel="% of the samples that are larger", ylabel="|g|")
    for late, label in ((False, "at first"), (True, "at the end")):
        found = watched.sizes(late).sort(descending=True).values
        found = found[found > 0]
        if len(found):
            axes.semilogy([100 * k / len(found) for k in range(len(found))], found.tolist(), label=label)
    if axes.has_data():
        axes.legend()


def _draw_errors(axes: Any, sizes: Tensor | None, errors: Tensor | None) -> None:
    axes.set(title="float32 against float64", xlabel="|g|", ylabel="error of g in float32")
    if sizes is None or errors is None:
        axes.text(0.5, 0.5, "not compared", ha="center", transform=axes.transAxes)
        return
    seen = (sizes > 0) & (errors > 0)
    if bool(seen.any()):
        axes.loglog(sizes[seen].tolist(), errors[seen].tolist(), ".", markersize=4)
