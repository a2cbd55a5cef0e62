"""A running mean that leaves out what is not finite and bounds what is suddenly large."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from newton_plugin._runtime.cuda_graphs import capturing, carried

__all__ = ["RunningMean", "without_empty"]


class RunningMean:
    """Exponential running mean of a tensor, corrected for its start as Adam's moments are.

    ``mean_t = sum_k decay^k x_(t-k) / sum_k decay^k``, so the first mean is the first value. With
    ``decay = 0`` the mean is the last value and nothing is stored. A value that is not finite leaves the mean
    as it was. A value whose norm exceeds ``growth`` times the mean's is scaled down to that (a winsorised mean), so
    that a single exploded batch does not silence the next hundred. No host synchronisation decides either.

    Every line of :meth:`update` is an operation or two on the device, at every step. So the norm serves twice: it says
    whether a value is finite and whether it is large. What is stored is the mean and the number of values it counts
    as, ``count_t = 1 + decay count_(t-1)``, so that the next value's share is 1 / count.

    Args:
        nonnegative: whether values without dimensions are never negative (sums of squares). Each is then its own norm.

    Attributes:
        finite: whether the last value was finite; a tensor without dimensions.
    """

    def __init__(self, nonnegative: bool = False) -> None:
        self.finite: Tensor | None = None
        self._nonnegative = nonnegative
        self._mean: Tensor | None = None
        self._count: Tensor | None = None
        self._norm: Tensor | None = None  # of the mean; computed when it is first asked for
        self._in_place = False  # a CUDA graph reads and writes mean and count where they are

    def update(self, value: Tensor, decay: float, growth: float = math.inf) -> Tensor:
        """Add ``value`` and return the mean; zeros if nothing finite has come yet.

        With ``decay = 0`` what is not finite in ``value`` is returned as zero: decompositions raise on it.
        """
        size = self._norm_of(value)
        self.finite = finite = size < math.inf
        if decay == 0:
            return value.nan_to_num(0.0, 0.0, 0.0)
        mean, count = self._before(value)
        if mean is None or count is None:
            return self._store(torch.where(finite, value, 0.0), finite.to(value.dtype))
        if growth < math.inf:
            value = self._bounded(value, size, growth)
        count = torch.where(finite, torch.rsub(count, 1.0, alpha=-decay), count)
        # Before anything finite has come the count is 0 and the value is dropped: any share will do.
        return self._store(torch.where(finite, torch.lerp(mean, value, count.reciprocal()), mean), count)

    def update_finite(self, value: Tensor, decay: float) -> Tensor:
        """:meth:`update` by a value that is known to be finite, ``decay > 0``: half the operations."""
        mean, count = self._before(value)
        if mean is None or count is None:
            # A copy: during a capture the mean is written in place, and the caller's value must not change with it.
            return self._store(value.clone(), value.new_ones(()))
        count = torch.rsub(count, 1.0, alpha=-decay)
        return self._store(torch.lerp(mean, value, count.reciprocal()), count)

    def _norm_of(self, value: Tensor) -> Tensor:
        return value if self._nonnegative and value.ndim == 0 else torch.linalg.vector_norm(value)

    def _bounded(self, value: Tensor, size: Tensor, growth: float) -> Tensor:
        """``value``, of norm ``size``, scaled down to ``growth`` times the mean; not bounded where the mean is zero."""
        limit = growth * self.norm()
        if size is value:
            return torch.minimum(value, torch.threshold(limit, 0.0, math.inf))  # infinite where it is zero
        return value / (size / limit).nan_to_num(1.0, 1.0).clamp_min(1.0)  # x / 0 and 0 / 0 are 1

    def _store(self, mean: Tensor, count: Tensor) -> Tensor:
        """Keep both for the next step; return the mean, which no later step changes."""
        self._mean, self._norm = carried(self._mean, mean, self._in_place), None
        self._count = carried(self._count, count, self._in_place)
        return mean

    def norm(self) -> Tensor:
        """The norm of the mean that :meth:`update` has returned; for ``decay > 0``."""
        norm = self._norm
        if norm is None:
            assert self._mean is not None
            norm = self._norm = self._norm_of(self._mean)
        return norm

    @property
    def count(self) -> Tensor:
        """How many values the mean counts as, no dimensions; after an :meth:`update` with ``decay > 0``."""
        assert self._count is not None
        return self._count

    def last(self, like: Tensor) -> Tensor | None:
        """The mean as it is, in dtype and device of ``like``; None if there is none of that shape."""
        return self._before(like)[0]

    def _before(self, value: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Mean and count as they were, in dtype and device of ``value``; None if they are of another shape."""
        if capturing(value):
            self._in_place, self._norm = True, None
        if self._mean is None or self._mean.shape != value.shape:
            return None, None
        if self._mean.device != value.device or self._mean.dtype != value.dtype:
            self._mean, self._norm = self._mean.to(value), None
            self._count = None if self._count is None else self._count.to(value)
        return self._mean, self._count

    @staticmethod
    def initial_state(shape: Sequence[int], like: Tensor) -> dict[str, Tensor]:
        """The state of a mean of this shape before the first value: zeros of count 0, in the dtype of ``like``."""
        return {"mean": like.new_zeros(tuple(shape)), "count": like.new_zeros(())}

    def state_dict(self) -> dict[str, Any]:
        """Mean and count as plain tensors; empty before the first value."""
        if self._mean is None:
            return {}
        if self._in_place and self._count is not None:  # replays go on writing into both
            return {"mean": self._mean.clone(), "count": self._count.clone()}
        return {"mean": self._mean, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave. A mean of count 0 is none yet: the first value takes its place.

        Raises:
            TypeError: a state of something else.
        """
        mean, count = state.get("mean"), state.get("count")
        if not all(value is None or isinstance(value, Tensor) for value in (mean, count)):
            raise TypeError("the state of a running mean holds two tensors")
        self._mean, self._count, self._norm = mean, count, None
        self._in_place = False


def without_empty(states: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The states that hold anything: a mean without a value has none."""
    return {name: state for name, state in states.items() if state}
