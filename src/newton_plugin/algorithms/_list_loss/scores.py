"""What every sort and every ranking asks of its scores."""

from __future__ import annotations

from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError, ShapeError, check_floating
from newton_plugin.algorithms._log_domain import can_look

__all__ = ["check_lengths", "check_scores"]


def check_scores(scores: Tensor) -> None:
    """Raise unless ``scores`` is a floating-point tensor of shape (..., n), n >= 1."""
    check_floating("scores", scores)
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ShapeError(
            f"scores must have shape (..., n) with n >= 1; got {tuple(scores.shape)}. "
            "Put the list in the last dimension."
        )


def check_lengths(scores: Tensor, lengths: Tensor) -> None:
    """Raise unless ``lengths`` are integers from 0 to n, one for each list of ``scores`` (..., n)."""
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.is_complex():
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ArgumentTypeError(f"lengths must be a tensor of integers, one for each list; got {got}.")
    if lengths.shape != scores.shape[:-1]:
        raise ShapeError(
            f"lengths must have one number for each list, shape {tuple(scores.shape[:-1])}; got {tuple(lengths.shape)}."
        )
    n = scores.shape[-1]
    if can_look(lengths) and lengths.numel() and not 0 <= lengths.min().item() <= lengths.max().item() <= n:
        raise ArgumentError(
            f"lengths must be from 0 to the length of the padded lists, {n}; got {lengths.min().item()} to "
            f"{lengths.max().item()}."
        )
