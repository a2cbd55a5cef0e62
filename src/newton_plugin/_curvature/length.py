"""The length of a step whose rule leaves it free: that of the gradient, over the first batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_plugin._curvature.running_mean import RunningMean

__all__ = ["Length"]

_BATCHES = 20


class Length:
    """A factor that makes the first batches' steps as long as their gradients, and then stays.

    It is the geometric mean of ``|gradient| / |step|`` over the batches so far, up to the twentieth. A batch without a
    gradient, or with one that is not finite, does not count.
    """

    def __init__(self) -> None:
        self._logs = RunningMean()

    def update(self, gradient: Tensor, step: Tensor) -> Tensor:
        """The factor after this batch.

        Args:
            gradient: ``sum |g_i|^2``, no dimensions.
            step: ``sum |step_i|^2`` without the factor, no dimensions.
        """
        log = (gradient / step).log() / 2  # NaN and infinities are no values of a running mean
        mean = self._logs.last(log)
        if mean is None:
            return self._logs.update(log, 1.0).exp()
        return self._logs.update(log.masked_fill(self._logs.count >= _BATCHES, torch.nan), 1.0).exp()

    def initial_state(self, like: Tensor) -> dict[str, Any]:
        """The state before the first step."""
        return RunningMean.initial_state((), like)

    def state_dict(self) -> dict[str, Any]:
        """The mean of the logarithms, and how many there were."""
        return self._logs.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._logs.load_state_dict(state)
