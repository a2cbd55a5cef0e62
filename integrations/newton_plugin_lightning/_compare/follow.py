"""A callback that reads the metric while a module trains: its curve, and its value when training ends."""

from __future__ import annotations

import math
from typing import Any

from typing_extensions import override

from newton_plugin_lightning._bases import CallbackBase

__all__ = ["Follow"]

_POINTS = 200  # of a curve; more are thinned


class Follow(CallbackBase):
    """Notes the metric after each validation and each epoch, and every `log_every_n_steps` where it is a step's own.

    Attributes:
        curve: (optimizer step, value) pairs, one for each step.
    """

    def __init__(self, metric: str) -> None:
        super().__init__()
        self.metric = metric
        self.curve: list[tuple[int, float]] = []

    def value(self, trainer: Any) -> float | None:
        """The metric now; None if it has not been logged yet."""
        found = trainer.callback_metrics.get(self.metric)
        return None if found is None else float(found)

    @override
    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Not in the sanity check before training."""
        if not trainer.sanity_checking:
            self._note(trainer, again=True)

    @override
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._note(trainer, again=False)

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % max(1, trainer.log_every_n_steps) == 0:
            self._note(trainer, again=False)

    def _note(self, trainer: Any, again: bool) -> None:
        """A value that is the one before it is noted again only where it was measured again."""
        value, step = self.value(trainer), int(trainer.global_step)
        if value is None or (not again and self.curve and self.curve[-1][1] == value):
            return
        if self.curve and self.curve[-1][0] == step:
            self.curve.pop()
        self.curve.append((step, value))

    def thinned(self) -> list[tuple[int, float]]:
        """Its finite points, at most 200, evenly spaced, first and last among them."""
        finite = [point for point in self.curve if math.isfinite(point[1])]
        last = len(finite) - 1
        if last < _POINTS:
            return finite
        return [finite[round(k * last / (_POINTS - 1))] for k in range(_POINTS)]
