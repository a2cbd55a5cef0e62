"""A running mean that ignores what is not finite and doubts what is suddenly large."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from newton_plugin._runtime.cuda_graphs import capturing, carried

__all__ = ["RunningMean"]


class RunningMean:
    """Exponential running mean of a tensor, corrected for its start (as Adam's moments are).

    ``mean_t = sum_k decay^k x_(t-k) / sum_k decay^k``, so the first mean is the first value. With
    ``decay = 0`` it is the last value and nothing is stored. A value that is not finite leaves the mean
    as it was; one whose norm exceeds ``growth`` times the mean's is scaled down to that (a winsorised mean), so
    that a single exploded batch does not silence the next hundred. No host synchronisation decides either.

    Every line below is an operation or two on the device, at every step: the norm says whether a value is finite as
    well as whether it is large, and what is kept is the mean with the number of values it counts as,
    ``count_t = 1 + decay count_(t-1)``, so that the next value's share is 1 / count.

    Args:
        nonnegative: values without dimensions are never negative (sums of squares), so each is its own norm.

    Attributes:
        finite: whether the last value was; a tensor without dimensions.
    """

    def __init__(self, nonnegative: bool = False) -> None:
        self.finite: Tensor | None = None
        self._nonnegative = nonnegative
        self._mean: Tensor | None = None
        self._count: Tensor | None = None
        self._norm: Tensor | None = None  # of the mean, once somebody has asked
        self._weight: Tensor | None = None  # (1 - decay) count, in a state from before the count was kept
        self._in_place = False  # a CUDA graph reads and writes mean and count where they are

    def update(self, value: Tensor, decay: float, growth: float = math.inf) -> Tensor:
        """Take ``value`` in and return the mean; zeros if nothing finite has come yet.

        With ``decay = 0`` what is not finite in ``value`` is returned as zero: decompositions raise on it.
        """
        size = self._norm_of(value)
        self.finite = finite = size < math.inf
        if decay == 0:
            return value.nan_to_num(0.0, 0.0, 0.0)
        mean, count = self._before(value, decay)
        if mean is None or count is None:
            return self._keep(torch.where(finite, value, 0.0), finite.to(value.dtype))
        if growth < math.inf:
            value = self._bounded(value, size, growth)
        count = torch.where(finite, torch.rsub(count, 1.0, alpha=-decay), count)
        # Before anything finite has come the count is 0 and the value is dropped: any share will do.
        return self._keep(torch.where(finite, torch.lerp(mean, value, count.reciprocal()), mean), count)

    def update_finite(self, value: Tensor, decay: float) -> Tensor:
        """:meth:`update` by a value that is known to be finite, ``decay > 0``: half the operations."""
        mean, count = self._before(value, decay)
        if mean is None or count is None:
            # A copy: whoever holds the value must not see it change in a capture.
            return self._keep(value.clone(), value.new_ones(()))
        count = torch.rsub(count, 1.0, alpha=-decay)
        return self._keep(torch.lerp(mean, value, count.reciprocal()), count)

    def _norm_of(self, value: Tensor) -> Tensor:
        return value if self._nonnegative and value.ndim == 0 else torch.linalg.vector_norm(value)

    def _bounded(self, value: Tensor, size: Tensor, growth: float) -> Tensor:
        """``value``, of norm ``size``, scaled down to ``growth`` times the mean; no bound where the mean is zero."""
        limit = growth * self.norm()
        if size is value:
            return torch.minimum(value, torch.threshold(limit, 0.0, math.inf))  # infinite where it is zero
        return value / (size / limit).nan_to_num(1.0, 1.0).clamp_min(1.0)  # x / 0 and 0 / 0 are 1

    def _keep(self, mean: Tensor, count: Tensor) -> Tensor:
        """For the next step; returns the mean, which no later step changes."""
        self._mean, self._norm = carried(self._mean, mean, self._in_place), None
        self._count = carried(self._count, count, self._in_place)
        return mean

    def norm(self) -> Tensor:
        """Of the mean that :meth:`update` has returned; for ``decay > 0``."""
        norm = self._norm
        if norm is None:
            assert self._mean is not None
            norm = self._norm = self._norm_of(self._mean)
        return norm

    def _before(self, value: Tensor, decay: float) -> tuple[Tensor | None, Tensor | None]:
        """Mean and count as they were, in dtype and device of ``value``; None if they are of another shape."""
        if capturing(value):
            self._in_place, self._norm = True, None
        if self._mean is None or self._mean.shape != value.shape:
            return None, None
        if self._count is None and self._weight is not None:
            self._count, self._weight = self._weight / (1 - decay), None
        if self._mean.device != value.device or self._mean.dtype != value.dtype:
            self._mean, self._norm = self._mean.to(value), None
            self._count = None if self._count is None else self._count.to(value)
        return self._mean, self._count

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, empty before the first value."""
        if self._mean is None:
            return {}
        if self._weight is not None:  # nothing has come since it was loaded
            return {"total": self._mean * self._weight, "weight": self._weight}
        if self._in_place and self._count is not None:
            return {"mean": self._mean.clone(), "count": self._count.clone()}
        return {"mean": self._mean, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, in this version or before the count was kept."""
        self._mean, self._count, self._weight, self._norm = state.get("mean"), state.get("count"), None, None
        self._in_place = False
        if "total" in state:
            self._weight = state["weight"]
            self._mean = state["total"] / state["weight"].clamp_min(torch.finfo(state["total"].dtype).tiny)
