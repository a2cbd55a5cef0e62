"""What a curvature needs of the samples of all processes, named before its step so that it travels with other news."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from newton_plugin._runtime.processes import Ranks

__all__ = ["Answered", "Statistics"]


@dataclass(frozen=True)
class Statistics:
    """Sums over the samples of this process; see :meth:`newton_plugin.Curvature.statistics`.

    Attributes:
        total: what is summed, of any shape.
        count: what the sum over all processes is divided by, summed as well.
        squared: the ``|g_i|^2``, (N,), if the sums were made of them: the step needs them again.
    """

    total: Tensor
    count: Tensor | int
    squared: Tensor | None = None


class Answered:
    """The processes of a step whose first questions have been answered already; see :class:`Ranks`.

    Args:
        ranks: for all other questions.
        known: what the curvature has named.
        mean: its sum over the processes, divided by the sum of its counts.
        worst: the worst code of any process, if it is known.
        covers: see :class:`Ranks`. If not, nothing is asked any more: every process judges its own gradients.
    """

    many = True

    def __init__(
        self,
        ranks: Ranks,
        known: Statistics | None = None,
        mean: Tensor | None = None,
        worst: int | None = None,
        covers: bool = True,
    ) -> None:
        self.known = known
        self.answer = mean
        self.covers = covers
        self._ranks = ranks
        self._samples: int | None = None  # of all processes, once somebody has asked
        self._worst = worst

    def mean(self, total: Tensor, count: Tensor | int) -> Tensor:
        if self.known is not None and total is self.known.total and self.answer is not None:
            return self.answer
        return self._ranks.mean(total, count)

    def sum(self, value: Tensor) -> Tensor:
        return self._ranks.sum(value)

    def count(self, own: int) -> int:
        if self._samples is None:
            self._samples = self._ranks.count(own)
        return self._samples

    def worst(self, code: int) -> int:
        return self._ranks.worst(code) if self._worst is None else self._worst

    def all(self, flag: Tensor) -> Tensor:
        return self._ranks.all(flag) if self.covers else flag

    def rows(self, own: Tensor) -> Any:
        return self._ranks.rows(own)
