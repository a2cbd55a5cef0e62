"""NDCG and average precision, made differentiable by a soft permutation matrix.

Both metrics depend on the relevance at each position of the list sorted by descending score. With ``P`` (row 0
the largest) the element at position i is a mixture, and its relevance is ``(P @ relevance)_i``. Put into the
metrics' own formulas, this gives the metrics exactly in the hard limit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentTypeError, ShapeError, check_choice, check_floating
from newton_plugin.algorithms._ranking.top_k import soft_top_k
from newton_plugin.algorithms._sorting.methods import Method

__all__ = ["average_precision_loss", "ndcg_loss"]


def ndcg_loss(
    scores: Tensor,
    relevance: Tensor,
    method: Method = "neural_sort",
    *,
    k: int | None = None,
    gain: str = "exponential",
    **kwargs: Any,
) -> Tensor:
    r"""One minus the normalised discounted cumulative gain, mean over the lists.

    .. math:: 1 - \frac{\sum_{i=1}^{k} (P g)_i / \log_2(1 + i)}{\sum_{i=1}^{k} g_{(i)} / \log_2(1 + i)}

    with :math:`g = 2^{\text{relevance}} - 1` and :math:`g_{(i)}` the i-th largest gain.

    Args:
        scores: (..., n), floating point.
        relevance: (..., n), >= 0; integers or floats. A list with no relevant element has the loss 0.
        method, **kwargs: as in ``soft_top_k``.
        k: only the first k positions count; all by default.
        gain: ``"exponential"``, or ``"linear"`` for g = relevance.

    Raises:
        ArgumentError, ArgumentTypeError, ShapeError: k, gain, dtypes or shapes that do not fit.

    Source: Swezey, Grover, Charron, Ermon, "PiRank: scalable learning to rank via differentiable sorting",
    NeurIPS 2021, section 3.

    The relevant element is second: 1 - 1/log2(3).

    >>> round(ndcg_loss(torch.tensor([2.0, 1.0]), torch.tensor([0, 1]), temperature=0.01).item(), 4)
    0.3691
    """
    _check(scores, relevance)
    check_choice("gain", gain, ("exponential", "linear"))
    n = scores.shape[-1]
    k = n if k is None else k
    p = soft_top_k(scores, k, method, **kwargs)
    g = relevance.to(p.dtype)
    g = torch.exp2(g) - 1 if gain == "exponential" else g
    discount = torch.log2(torch.arange(2, k + 2, device=p.device, dtype=p.dtype)).reciprocal()
    ideal = (g.sort(dim=-1, descending=True).values[..., :k] * discount).sum(-1)
    found = ((p * g.unsqueeze(-2)).sum(-1) * discount).sum(-1)
    relevant = ideal > 0
    return torch.where(relevant, 1 - found / torch.where(relevant, ideal, 1.0), 0.0).mean()


def average_precision_loss(scores: Tensor, relevance: Tensor, method: Method = "neural_sort", **kwargs: Any) -> Tensor:
    r"""One minus average precision, mean over the lists.

    .. math:: 1 - \frac{1}{R}\sum_{i=1}^{n} \frac{r_i}{i} \Big(1 + \sum_{l < i} r_l\Big)

    with r = P @ relevance and R relevant elements. With a permutation matrix the bracket counts the relevant
    elements down to position i, so this is average precision; with a soft one it is its expectation when the
    rows of P are drawn independently.

    Args:
        scores: (..., n), floating point.
        relevance: (..., n), 0 or 1 (bool, integer or float). A list with no relevant element has the loss 0.
        method, **kwargs: as in ``soft_top_k``.

    Raises:
        ArgumentTypeError, ShapeError: dtypes or shapes that do not fit.

    Source: the definition of average precision; the relaxation of its positions as in Swezey et al., NeurIPS
    2021.

    Relevant elements first and third: AP = (1/1 + 2/3)/2 = 5/6.

    >>> scores, relevance = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1, 0, 1])
    >>> round(average_precision_loss(scores, relevance, temperature=0.01).item(), 4)
    0.1667
    """
    _check(scores, relevance)
    n = scores.shape[-1]
    p = soft_top_k(scores, n, method, **kwargs)
    y = relevance.to(p.dtype)
    r = (p * y.unsqueeze(-2)).sum(-1)
    position = torch.arange(1, n + 1, device=p.device, dtype=p.dtype)
    precision = (1 + r.cumsum(-1) - r) / position
    relevant = y.sum(-1)
    some = relevant > 0
    return torch.where(some, 1 - (r * precision).sum(-1) / torch.where(some, relevant, 1.0), 0.0).mean()


def _check(scores: Tensor, relevance: Tensor) -> None:
    check_floating("scores", scores)
    if not isinstance(relevance, Tensor):
        raise ArgumentTypeError(f"relevance must be a tensor; got {type(relevance).__name__}.")
    if scores.ndim == 0 or scores.shape != relevance.shape:
        raise ShapeError(
            f"scores and relevance must have the same shape (..., n); got {tuple(scores.shape)} and "
            f"{tuple(relevance.shape)}."
        )
