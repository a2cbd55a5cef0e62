"""What is kept of a fit for the summary at its end: numbers that stay on the device until then.

Some batches are looked at, as many as a logger sees (``log_every_n_steps``), and the first one. Of each a few scalars
are kept, and of small boundaries the second moment of the gradients, whose eigenvalues are the spread. At most 64
batches are kept: when there are more, every other one is dropped, so that they lie evenly over the fit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from newton_plugin_lightning._eigenvalues import eigenvalues

__all__ = ["Look", "Vitals"]

MOST = 64


@dataclass
class Look:
    """What was seen of one batch.

    Attributes:
        step: the optimizer steps before it.
        times: of the host, one for each loss of the batch: ``LossHook.timed``.
        numbers: on the device, without dimensions; by name, one for each boundary.
        moments: second moments, (k, k), of the boundaries where they are small; with what makes of their eigenvalues
            the spread.
    """

    step: int
    times: list[Any] = field(default_factory=list)
    numbers: dict[str, list[Tensor]] = field(default_factory=dict)
    moments: list[tuple[Tensor, Callable[[Tensor], float]]] = field(default_factory=list)

    def take(self, last_steps: Sequence[Any]) -> None:
        """Keep what a hook's ``last_steps`` show. Launches a few operations, and waits for none."""
        for last in last_steps:
            values = {
                "gradient_square": last.gradient_square,
                "step_square": last.step_square,
                "tail": last.tail,
                **last.readings,
            }
            for name, value in values.items():
                self.numbers.setdefault(name, []).append(value.detach())
            moment = last.second_moment
            if moment is not None:
                self.moments.append((moment, last.spread_of))

    def read(self) -> dict[str, float]:
        """The numbers of all boundaries together, on the host. NaN: not known."""
        times = sum(time.seconds for time in self.times) if self.times else float("nan")
        read = {name: torch.stack([v.float().cpu() for v in values]) for name, values in self.numbers.items()}
        summed = {name.replace("square", "norm"): float(read.pop(name).sum().sqrt()) for name in _SQUARES & read.keys()}
        spreads = torch.tensor([spread_of(eigenvalues(moment)) for moment, spread_of in self.moments])
        summed["seconds"] = times
        return {**summed, **{name: _largest(v) for name, v in read.items()}, "spread": _largest(spreads)}


_SQUARES = {"gradient_square", "step_square"}


def _largest(values: Tensor) -> float:
    known = values[~values.isnan()]
    return float(known.max()) if len(known) else float("nan")


class Vitals:
    """Counts of a fit, and its looks.

    Attributes:
        taken: batches whose loss took a step.
        plain: batches of training that were left plain.
        looks: what was kept.
        seconds, batches: the host's seconds for batches that took a step and were not looked at, and their number.
    """

    def __init__(self) -> None:
        self.taken = self.plain = self.batches = 0
        self.seconds = 0.0
        self.looks: list[Look] = []
        self._stride, self._offered, self._last = 1, 0, -1
        self._began: float | None = None
        self._looked = False

    def begin_batch(self) -> None:
        """A batch of training begins."""
        self._began, self._looked = time.perf_counter(), False

    def end_batch(self, hooked: bool) -> None:
        """It ends; whether it took a step. The time of the first ones is left out: much is made ready there."""
        self.taken, self.plain = self.taken + hooked, self.plain + (not hooked)
        if hooked and self._began is not None and not self._looked and self.taken > 2:
            self.seconds += time.perf_counter() - self._began
            self.batches += 1
        self._began = None

    def due(self, step: int, every: int) -> bool:
        """Whether the batch that begins after so many optimizer steps is one to look at; once for each step."""
        if step == self._last or (self._offered and (every < 1 or (step + 1) % every)):
            return False
        self._last = step
        self._offered += 1
        return (self._offered - 1) % self._stride == 0

    def look(self, step: int) -> Look:
        """Begin a look at this batch, and keep it."""
        self._looked = True
        self.looks.append(Look(step))
        begun = self.looks[-1]
        if len(self.looks) > MOST:
            self.looks = self.looks[::2]
            self._stride *= 2
        return begun

    def look_at_last(self, step: int, last_steps: Sequence[Any]) -> None:
        """Keep the last step too, unless it has been looked at."""
        if not self._looked:
            self.looks.append(Look(step))
            self.looks[-1].take(last_steps)

    def read(self) -> list[Mapping[str, float]]:
        """The numbers of every look that saw a step, with "seconds" of the host. Waits for the device."""
        return [look.read() for look in self.looks if look.numbers]
