"""Watches the steps of one fit: for the loggers, the progress bar, figures, and the summary at its end.

Diagnostics and figures wait for the device, at the steps at which they are written; the summary at the end alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from newton_plugin import LossHook
from newton_plugin_lightning._figures import Figures
from newton_plugin_lightning._summary import summary
from newton_plugin_lightning._telling import tell
from newton_plugin_lightning._vitals import Look, Vitals

__all__ = ["Observer", "steps_of"]


def steps_of(trainer: Any) -> int:
    """Optimizer steps so far, as the Trainer counts them for its loggers."""
    return getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)


class Observer:
    """Of the hook of one fit.

    Args:
        hook: takes the steps.
        trainer: of the fit.
        log: whether diagnostics go to the loggers, and a summary is told at the end.
        prog_bar: whether the size of the step goes to the progress bar.
        figures_every: optimizer steps from one figure to the next; None: none is drawn.
    """

    def __init__(self, hook: LossHook, trainer: Any, log: bool, prog_bar: bool, figures_every: int | None) -> None:
        self._hook, self._trainer, self._log, self._prog_bar, self._every = hook, trainer, log, prog_bar, figures_every
        self._summarised = log and not trainer.barebones
        self._vitals = Vitals()
        self._figures = None if figures_every is None or trainer.barebones else Figures(trainer)
        self._look: Look | None = None
        self._hooked = self._logging = self._drawing = False
        self._drawn = -1

    def batch_begins(self) -> None:
        """A batch of training, with or without a step."""
        self._vitals.begin_batch()
        self._hooked = False

    def batch_ends(self) -> None:
        """After the optimizer, if this batch has a step of it."""
        self._vitals.end_batch(self._hooked)

    def step_begins(self) -> None:
        """A training step that may take a step of the hook: decide who looks at it."""
        self._look, self._logging, step = None, self._logs_this_step(), steps_of(self._trainer)
        self._drawing = self._figures is not None and step != self._drawn and not (step + 1) % (self._every or 1)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Around a call of the hook."""
        step = steps_of(self._trainer)
        if not self._hooked and self._summarised and self._vitals.due(step, self._trainer.log_every_n_steps):
            self._look = self._vitals.look(step)
        self._hooked = True
        if self._look is None:
            yield
        else:
            with self._hook.timed() as time:
                yield
            self._look.times.append(time)

    def step_ended(self, module: Any) -> None:
        """The backward pass of this module has run."""
        if self._look is not None:
            self._look.take(self._hook.last_steps)
            self._look = None
        if self._drawing and self._figures is not None:
            self._drawing, self._drawn = False, steps_of(self._trainer)
            self._figures.draw(self._hook.last_steps, self._drawn)
        if self._logging:
            self._logging = False
            self._write(module)

    def _logs_this_step(self) -> bool:
        """Whether Lightning's logger writes after this step. Reading diagnostics waits for the device."""
        trainer = self._trainer
        wanted = self._prog_bar or (self._log and bool(trainer.loggers))
        if not wanted or trainer.barebones or trainer.log_every_n_steps == 0:
            return False
        return (steps_of(trainer) + 1) % trainer.log_every_n_steps == 0

    def _write(self, module: Any) -> None:
        to_logger = self._log and bool(self._trainer.loggers)
        for name, value in self._hook.diagnostics().items():
            in_bar = self._prog_bar and name == "step_norm"
            if to_logger or in_bar:
                where = {"logger": to_logger, "prog_bar": in_bar, "on_step": True, "on_epoch": False}
                module.log(f"newton/{name}", value, batch_size=1, **where)

    def fit_ends(self) -> None:
        """Tell the summary. Waits for the device."""
        if not self._summarised:
            return
        if self._vitals.taken:
            self._vitals.look_at_last(steps_of(self._trainer), self._hook.last_steps)
        where = "; ".join(map(str, self._hook.boundaries))
        tell(self._trainer, "%s", summary(self._vitals, where, self._hook.fallbacks))
