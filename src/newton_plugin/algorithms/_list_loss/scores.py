"""What every sort and every ranking asks of its scores."""

from __future__ import annotations

from torch import Tensor

from newton_plugin._errors import ShapeError, check_floating

__all__ = ["check_scores"]


def check_scores(scores: Tensor) -> None:
    """Raise unless ``scores`` is a floating-point tensor of shape (..., n), n >= 1."""
    check_floating("scores", scores)
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ShapeError(
            f"scores must have shape (..., n) with n >= 1; got {tuple(scores.shape)}. "
            "Put the list in the last dimension."
        )
