"""A running mean that ignores what is not finite and doubts what is suddenly large."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["RunningMean"]


class RunningMean:
    """Exponential running mean of a tensor, corrected for its start (as Adam's moments are).

    ``mean_t = sum_k decay^k x_(t-k) / sum_k decay^k``, so the first mean is the first value. With
    ``decay = 0`` it is the last value and nothing is stored. A value that is not finite leaves the mean
    as it was; one whose norm exceeds ``growth`` times the mean's is scaled down to that (a winsorised mean), so
    that a single exploded batch does not silence the next hundred. No host synchronisation decides either.
    """

    def __init__(self) -> None:
        self.finite: Tensor | None = None  # whether the last value was
        self._total: Tensor | None = None
        self._weight: Tensor | None = None

    def update(self, value: Tensor, decay: float, growth: float = math.inf) -> Tensor:
        """Take ``value`` in and return the mean; zeros if nothing finite has come yet."""
        self.finite = finite = torch.isfinite(value).all()
        value = torch.where(finite, value, 0.0)
        if decay == 0:
            return value
        if self._total is None or self._weight is None or self._total.shape != value.shape:
            total, weight = torch.zeros_like(value), torch.zeros_like(finite, dtype=value.dtype)
        else:
            total, weight = self._total.to(value), self._weight.to(value)
        known = total / weight.clamp_min(torch.finfo(value.dtype).tiny)
        if growth < math.inf:
            most, size = growth * torch.linalg.vector_norm(known), torch.linalg.vector_norm(value)
            value = torch.where((most > 0) & (size > most), value * (most / size), value)
        self._total = torch.where(finite, decay * total + (1 - decay) * value, total)
        self._weight = torch.where(finite, decay * weight + (1 - decay), weight)
        return self._total / self._weight.clamp_min(torch.finfo(value.dtype).tiny)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, empty before the first value."""
        if self._total is None or self._weight is None:
            return {}
        return {"total": self._total, "weight": self._weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._total = state.get("total")
        self._weight = state.get("weight")
