"""NDCG and average precision, made differentiable by a soft permutation matrix.

Both metrics depend on the relevance at each position of the list sorted by descending score. With ``P`` (row 0
the largest) the element at position i is a mixture, and its relevance is ``(P @ relevance)_i``. Put into the
metrics' own formulas, this gives the metrics exactly in the hard limit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import check_choice
from newton_plugin.algorithms._log_domain import can_look
from newton_plugin.algorithms._ranking.labels import check_relevance, full, judge_relevance, judged, present_first
from newton_plugin.algorithms._ranking.top_k import top_rows
from newton_plugin.algorithms._sorting.methods import Method

__all__ = ["average_precision_loss", "ndcg_loss"]


def ndcg_loss(
    scores: Tensor,
    relevance: Tensor,
    method: Method = "neural_sort",
    *,
    k: int | None = None,
    gain: str = "exponential",
    mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    r"""One minus the normalised discounted cumulative gain, mean over the lists.

    .. math:: 1 - \frac{\sum_{i=1}^{k} (P g)_i / \log_2(1 + i)}{\sum_{i=1}^{k} g_{(i)} / \log_2(1 + i)}

    with :math:`g = 2^{\text{relevance}} - 1` and :math:`g_{(i)}` the i-th largest gain. Grades of any size: both sums
    are divided by the same power of two.

    Args:
        scores: (..., n), floating point.
        relevance: (..., n), finite and >= 0; integers, booleans or floats. A list with no relevant element has the
            loss 0.
        method, **kwargs: as in ``soft_top_k``.
        k: only the first k positions count; all by default.
        gain: ``"exponential"``, or ``"linear"`` for g = relevance.
        mask: (..., n), boolean, true where there is an element; masked scores and relevance may hold anything. Each
            list then has the loss that it has alone (with all its positions if it is shorter than k, 0 if it is
            empty), and every list counts the same.

    The result is in the dtype of the scores (float32 for half precision).

    Raises:
        ArgumentError: relevance is negative, NaN or infinite. (On a device, in compiled code and under ``torch.func``
            the host does not look: the loss is NaN.)
        ArgumentError, ArgumentTypeError, ShapeError: k, gain, mask, dtypes or shapes that do not fit.

    Source: Swezey, Grover, Charron, Ermon, "PiRank: scalable learning to rank via differentiable sorting",
    NeurIPS 2021, section 3.

    The relevant element is second: 1 - 1/log2(3).

    >>> round(ndcg_loss(torch.tensor([2.0, 1.0]), torch.tensor([0, 1]), temperature=0.01).item(), 4)
    0.3691
    """
    check_choice("gain", gain, ("exponential", "linear"))
    check_relevance(scores, relevance, mask)
    s, y, lengths = _lists(scores, relevance, mask)
    verdict = judge_relevance(relevance, y, mask, binary=False)
    k = s.shape[-1] if k is None else k
    p = top_rows(-s, k, method, kwargs, lengths)
    g = (_exponential if gain == "exponential" else _linear)(y.to(p.dtype))
    discount = torch.log2(torch.arange(2, k + 2, device=p.device, dtype=p.dtype)).reciprocal()
    ideal = (g.sort(dim=-1, descending=True).values[..., :k] * discount).sum(-1)
    found = ((p * g.unsqueeze(-2)).sum(-1) * discount).sum(-1)
    relevant = ideal > 0
    return judged(torch.where(relevant, 1 - found / torch.where(relevant, ideal, 1.0), 0.0), verdict).mean()


_LARGEST = 64  # the largest logarithm of a gain; float32 numbers end at 128, which leaves room for sums


def _exponential(grades: Tensor) -> Tensor:
    """``2^grade - 1`` of each list, (..., n), divided by a power of two that keeps it below 2^64."""
    if _small(grades, _LARGEST):
        return torch.exp2(grades) - 1
    excess = (grades.amax(-1, keepdim=True).ceil() - _LARGEST).clamp(min=0)
    return torch.exp2(grades - excess) - torch.exp2(-excess)


def _linear(grades: Tensor) -> Tensor:
    """The same for the grades themselves."""
    if _small(grades, 2.0**_LARGEST):
        return grades
    excess = (grades.amax(-1, keepdim=True).log2().ceil() - _LARGEST).clamp(min=0)
    return grades * torch.exp2(-excess)


def _small(grades: Tensor, largest: float) -> bool:
    """Whether nothing has to be divided; False where nobody can look."""
    return can_look(grades) and (grades.numel() == 0 or grades.max().item() <= largest)


def average_precision_loss(
    scores: Tensor, relevance: Tensor, method: Method = "neural_sort", *, mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    r"""One minus average precision, mean over the lists.

    .. math:: 1 - \frac{1}{R}\sum_{i=1}^{n} \frac{r_i}{i} \Big(1 + \sum_{l < i} r_l\Big)

    with r = P @ relevance and R relevant elements. With a permutation matrix the bracket counts the relevant
    elements down to position i, so this is average precision; with a soft one it is its expectation when the
    rows of P are drawn independently.

    Args:
        scores: (..., n), floating point.
        relevance: (..., n), 0 or 1 (bool, integer or float). A list with no relevant element has the loss 0.
        method, **kwargs: as in ``soft_top_k``.
        mask: (..., n), boolean, true where there is an element; masked scores and relevance may hold anything. Each
            list then has the loss that it has alone (0 if it is empty), and every list counts the same.

    The result is in the dtype of the scores (float32 for half precision).

    Raises:
        ArgumentError: relevance is neither 0 nor 1. (On a device, in compiled code and under ``torch.func`` the host
            does not look: the loss is NaN.)
        ArgumentTypeError, ShapeError: mask, dtypes or shapes that do not fit.

    Source: the definition of average precision; the relaxation of its positions as in Swezey et al., NeurIPS
    2021.

    Relevant elements first and third: AP = (1/1 + 2/3)/2 = 5/6.

    >>> scores, relevance = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1, 0, 1])
    >>> round(average_precision_loss(scores, relevance, temperature=0.01).item(), 4)
    0.1667
    """
    check_relevance(scores, relevance, mask)
    s, y, lengths = _lists(scores, relevance, mask)
    verdict = judge_relevance(relevance, y, mask, binary=True)
    n = s.shape[-1]
    p = top_rows(-s, n, method, kwargs, lengths)
    y = y.to(p.dtype)
    r = (p * y.unsqueeze(-2)).sum(-1)
    position = torch.arange(1, n + 1, device=p.device, dtype=p.dtype)
    precision = (1 + r.cumsum(-1) - r) / position
    relevant = y.sum(-1)
    some = relevant > 0
    loss = torch.where(some, 1 - (r * precision).sum(-1) / torch.where(some, relevant, 1.0), 0.0)
    return judged(loss, verdict).mean()


def _lists(scores: Tensor, relevance: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores, relevance (0 where masked) and lengths: with a mask, present elements are the first of their list."""
    scores = full(scores)
    relevance = relevance.to(scores.dtype)
    if mask is None:
        return scores, relevance, None
    order, lengths = present_first(mask)
    return (
        scores.masked_fill(~mask, 0.0).gather(-1, order),
        relevance.masked_fill(~mask, 0.0).gather(-1, order),
        lengths,
    )
