"""``Rule``, the base of all candidates: from the per-sample gradients of all replicas to their steps.

Most candidates could be a :class:`newton_plugin.Curvature`. They are written for all replicas at once because a search
tries many.
Notation, for one replica and batch: g_i the gradient of sample i (m numbers), l_i its loss, ``s = mean |g_i|^2``;
a bar over a quantity is its running mean over batches (decay .9, corrected for its start).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TINY", "Batch", "Rule"]

TINY = torch.finfo(torch.float64).tiny


def _no_head() -> Tensor:
    raise LookupError("nobody has said what the last layer is")


@dataclass
class Batch:
    """What a rule may look at.

    Attributes:
        gradient: (R, N, m), float64.
        loss: (R, N), the value of each sample's loss.
        outputs: (R, N, m).
        evaluate: other outputs (R, N, m) to their losses (R, N), without gradient.
        hessian: gives all per-sample Hessians, (R, N, m, m).
        head: gives every sample's gradient at the last layer's weights, (R, N, D).
    """

    gradient: Tensor
    loss: Tensor
    outputs: Tensor
    evaluate: Callable[[Tensor], Tensor]
    hessian: Callable[[], Tensor]
    head: Callable[[], Tensor] = _no_head

    def squared(self) -> Tensor:
        """``|g_i|^2``, (R, N, 1)."""
        return self.gradient.square().sum(-1, keepdim=True)


class Rule(ABC):
    """A step from a batch; instances keep running means.

    Attributes:
        needs_hessian: whether :meth:`step` asks the batch for Hessians.
        needs_head: whether it asks for gradients at the last layer.
    """

    needs_hessian = False
    needs_head = False

    def __init__(self) -> None:
        self._totals: dict[str, tuple[Tensor, float]] = {}

    @abstractmethod
    def step(self, batch: Batch) -> Tensor:
        """(R, N, m)."""

    def running(self, name: str, value: Tensor, decay: float = 0.9) -> Tensor:
        """The running mean of ``value``; the first one is the value itself."""
        total, weight = self._totals.get(name, (torch.zeros_like(value), 0.0))
        total, weight = decay * total + (1 - decay) * value.nan_to_num(0.0, 0.0, 0.0), decay * weight + 1 - decay
        self._totals[name] = total, weight
        return total / weight
