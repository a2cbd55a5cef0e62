"""What a ranking is compared with: relevance or ranks, and a mask for lists of different lengths.

Shapes and dtypes are always checked. **Values** outside their domain (padding such as -1 or -100 without a mask, NaN,
grades where 0 or 1 is due) must not become a number that looks like a loss:

* on the CPU they raise, because a tensor there can be looked at without waiting;
* on a device, in compiled code and inside transforms of ``torch.func`` nobody looks. There the loss of such a list is
  NaN. The host never waits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError, ShapeError, check_floating
from newton_plugin.algorithms._log_domain import can_look

__all__ = ["check_ranks", "check_relevance", "full", "judge_relevance", "judged", "present_first"]


def check_relevance(scores: Tensor, relevance: Tensor, mask: Tensor | None) -> None:
    """Raise unless relevance and mask fit the scores in shape and dtype."""
    check_floating("scores", scores)
    if not isinstance(relevance, Tensor):
        raise ArgumentTypeError(f"relevance must be a tensor; got {type(relevance).__name__}.")
    if relevance.is_complex():
        raise ArgumentTypeError(f"relevance must hold integers, booleans or real numbers; got {relevance.dtype}.")
    if scores.ndim == 0 or scores.shape != relevance.shape:
        raise ShapeError(
            f"scores and relevance must have the same shape (..., n); got {tuple(scores.shape)} and "
            f"{tuple(relevance.shape)}."
        )
    _check_mask(scores, mask)


def judge_relevance(relevance: Tensor, values: Tensor, mask: Tensor | None, binary: bool) -> Tensor | None:
    """Raise for relevance outside its domain; where nobody can look, the result is for :func:`judged`.

    Args:
        values: the same as floating-point numbers in any order, 0 where masked.
        binary: only 0 and 1 are allowed; otherwise every finite number that is not negative.
    """
    if relevance.dtype == torch.bool:
        return None
    if not can_look(values):
        return _verdict(((values == 0) | (values == 1)) if binary else (values >= 0) & (values < math.inf))
    if binary:
        if not torch.equal(values.ne(0).to(values.dtype), values):
            good = (relevance == 0) | (relevance == 1)
            hint = "Graded relevance becomes binary by (relevance > 0), or take ndcg_loss."
            _refuse("relevance", "be 0 or 1", relevance, good, mask, hint)
    elif values.numel():
        least, largest = values.detach().aminmax()
        if not (least.item() >= 0 and largest.item() < math.inf):
            numbers = relevance.to(values.dtype)
            good = (numbers >= 0) & (numbers < math.inf)
            _refuse(
                "relevance", "be finite and not negative", relevance, good, mask, "Grades count from 0, not relevant."
            )
    return None


def check_ranks(scores: Tensor, ranks: Tensor, mask: Tensor | None) -> Tensor | None:
    """Raise unless ranks and mask fit the scores; where nobody can look, the result is for :func:`judged`."""
    check_floating("scores", scores)
    if not isinstance(ranks, Tensor) or ranks.is_floating_point() or ranks.is_complex():
        raise ArgumentTypeError(
            f"ranks must be a tensor of integers, 0 = smallest; "
            f"got {ranks.dtype if isinstance(ranks, Tensor) else type(ranks).__name__}. "
            "From values, take values.argsort(-1).argsort(-1)."
        )
    if scores.ndim == 0 or scores.shape[-1] == 0 or scores.shape != ranks.shape:
        raise ShapeError(
            f"scores and ranks must have the same shape (..., n), n >= 1; got {tuple(scores.shape)} and "
            f"{tuple(ranks.shape)}. A scorer that ends in Linear(..., 1) needs .squeeze(-1)."
        )
    _check_mask(scores, mask)
    if not ranks.dtype.is_signed:
        return None
    present = ranks if mask is None else ranks.masked_fill(~mask, 0)
    if not can_look(present):
        return _verdict(present >= 0)
    if present.numel() and present.min().item() < 0:
        hint = "Integers below 0 in the right order become ranks by ranks - ranks.amin(-1, keepdim=True)."
        _refuse("ranks", "not be negative, 0 = smallest", ranks, ranks >= 0, mask, hint)
    return None


def _check_mask(scores: Tensor, mask: Tensor | None) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.dtype != torch.bool):
        raise ArgumentTypeError(
            f"mask must be a boolean tensor, true where there is an element; "
            f"got {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}."
        )
    if mask is not None and mask.shape != scores.shape:
        raise ShapeError(
            f"mask must have the shape of the scores; got {tuple(mask.shape)} and {tuple(scores.shape)}. "
            "From lengths: torch.arange(n) < lengths.unsqueeze(-1)."
        )


def _verdict(good: Tensor) -> Tensor:
    """1 for lists (...,) of which all labels are good, else NaN."""
    return torch.where(good.all(-1), 1.0, math.nan)


def _refuse(name: str, rule: str, labels: Tensor, good: Tensor, mask: Tensor | None, hint: str) -> None:
    bad = ~good if mask is None else ~good & mask
    where = tuple(bad.nonzero()[0].tolist())
    raise ArgumentError(
        f"{name} must {rule}; got {labels[where].item()} at index {where}. If this is padding, pass mask=, true where "
        f"there is an element. {hint}"
    )


def judged(loss: Tensor, verdict: Tensor | None) -> Tensor:
    """The loss of each list (...,); NaN where its labels are outside their domain."""
    return loss if verdict is None else loss * verdict.to(loss.dtype)


def full(scores: Tensor) -> Tensor:
    """The scores, in float32 if they are in half precision, in which sums over a list overflow."""
    return scores.float() if scores.element_size() < 4 else scores


def present_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (..., n) that put present elements first, in their order, and how many there are, (...,)."""
    return (~mask).to(torch.uint8).sort(dim=-1, stable=True).indices, mask.sum(-1)
