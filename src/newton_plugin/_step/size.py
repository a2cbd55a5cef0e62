r"""One size for a whole loss: what keeps the weights of its terms as their author chose them.

A rule with a relative damping makes steps of a size of its own, whatever the size of the gradient. Taken at each
boundary alone, it would undo the weights in ``L = sum_k w_k l_k``: a head's step goes as ``1/w_k``. And what reaches
parameters beside the boundaries (a penalty, a KL term of an earlier layer) would keep its size while all else changes
by orders of magnitude. So a step is split in two:

* its **shape** at boundary k, ``step_k / gain_k``: samples are weighed, directions turned. The *gain* is how much
  longer the rule makes the gradients of a batch, ``gain_k = sum_i g_i' step_i / sum_i |g_i|^2``.
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

from newton_plugin._linalg.large_rows import inner_products, squared_norms

__all__ = ["Gain", "gain_sums", "size_of"]


class Gain:
    """The gain of one rule in the last batch that had a gradient.

    It is not averaged over batches: then a term would count more or less than its author said wherever its gradient
    changes size.
    """

    def __init__(self) -> None:
        self._last: Tensor | None = None

    def update(self, along: Tensor, squares: Tensor) -> Tensor:
        """The gain of this batch, of the last one that had a gradient, or 0 where none had.

        Args:
            along: sum of ``g_i' step_i`` over the samples, no dimensions.
            squares: sum of ``|g_i|^2``, no dimensions.
        """
        last = torch.zeros_like(along) if self._last is None else self._last.to(along)
        ratio = along / squares
        self._last = torch.where((ratio > 0) & torch.isfinite(ratio), ratio, last)
        return self._last

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors; empty before the first batch."""
        return {} if self._last is None else {"last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._last = state.get("last")


def gain_sums(pairs: Sequence[tuple[Tensor, Tensor]], taken: Tensor | None) -> Tensor:
    """``sum g_i' step_i`` and ``sum |g_i|^2`` of one rule, (2,); NaN where its step was not taken.

    Args:
        pairs: gradients and steps, rows (N, m), of each call of the layer.
        taken: whether the step was taken; None: there is nothing to take.
    """
    pairs = [(g.to(step.dtype), step) for g, step in pairs]
    along = torch.stack([inner_products(g, step).sum() for g, step in pairs]).sum()
    squares = torch.stack([squared_norms(g).sum() for g, _ in pairs]).sum()
    sums = torch.stack([along, squares])
    # A gradient that was kept says nothing about the rule.
    return sums if taken is None else torch.where(taken, sums, torch.nan)


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
