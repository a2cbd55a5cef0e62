r"""One size for a whole loss: what keeps the weights of its terms as their author chose them.

A rule with a relative damping makes steps of a size of its own, whatever the size of the gradient. Taken at each
boundary alone, it would undo the weights in ``L = sum_k w_k l_k``: a head's step goes as ``1/w_k``. And what reaches
parameters beside the boundaries (a penalty, a KL term of an earlier layer) would keep its size while all else changes
by orders of magnitude. So a step is split in two:

* its **shape** at boundary k, ``step_k / gain_k``: samples are weighed, directions turned. The *gain* is how much
  longer the rule makes a gradient on average, ``gain_k = sum_i g_i' step_i / sum_i |g_i|^2``.
* its **size**, one number for the whole loss. For power p and m_k features,

  .. math:: size^{-1/p} = \sum_k m_k \, gain_k^{-1/p} \Big/ \sum_k m_k.

  Where C is a multiple of the identity, that is the gain of one C over the outputs of all boundaries together.

Boundary k gets ``size / gain_k * step_k``; whatever flows back beside the boundaries is multiplied by the size. With
one boundary and nothing beside it, this is the step of its rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from newton_plugin._curvature.damping import Averaging
from newton_plugin._curvature.running_mean import RunningMean

__all__ = ["Gain", "size_of"]


class Gain:
    """The gain of one rule, averaged over batches as its C is.

    A batch without a gradient has no gain: the last one stands.
    """

    def __init__(self) -> None:
        self._along = RunningMean()
        self._squares = RunningMean(nonnegative=True)
        self._last: Tensor | None = None

    def update(self, along: Tensor, squares: Tensor, averaging: Averaging) -> Tensor:
        """Add a batch; return the gain, 0 where there is none yet.

        Args:
            along: mean of ``g_i' step_i`` over the samples, no dimensions.
            squares: mean of ``|g_i|^2``, no dimensions.
            averaging: how the rule averages C.
        """
        a = self._along.update(along, averaging.decay, averaging.growth)
        b = self._squares.update(squares, averaging.decay, averaging.growth)
        last = torch.zeros_like(a) if self._last is None else self._last.to(a)
        ratio = a / b
        self._last = torch.where((ratio > 0) & torch.isfinite(ratio), ratio, last)
        return self._last

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors; empty before the first batch."""
        if self._last is None:
            return {}
        return {"along": self._along.state_dict(), "squares": self._squares.state_dict(), "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._along.load_state_dict(state.get("along", {}))
        self._squares.load_state_dict(state.get("squares", {}))
        self._last = state.get("last")


def size_of(gains: Sequence[Tensor], features: Sequence[int], power: float) -> tuple[Tensor, list[Tensor | None]]:
    """The size of a loss, no dimensions, and what each boundary's step is multiplied by; None: by nothing.

    Args:
        gains: of the K rules, no dimensions; 0 where a rule has none yet, which then has no say.
        features: of the outputs of each boundary.
        power: of the rules.
    """
    if len(gains) == 1:
        return torch.where(gains[0] > 0, gains[0], 1.0), [None]
    total, weight = torch.zeros_like(gains[0]), torch.zeros_like(gains[0])
    for gain, m in zip(gains, features, strict=True):
        known = gain > 0
        total = total + torch.where(known, m * gain ** (-1 / power), 0.0)
        weight = weight + known * m
    size = torch.where(weight > 0, (total / weight) ** -power, 1.0)
    return size, [torch.where(gain > 0, size / gain, 1.0) for gain in gains]
