"""Soft ranks, and Spearman's rank correlation as a loss.

Row i of a permutation matrix says which element has rank i, so column j says which rank element j has. A soft
permutation matrix therefore gives every element an expected rank, ``sum_i i P_ij``, between 0 and n - 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_plugin.algorithms._list_loss.scores import check_scores
from newton_plugin.algorithms._ranking.labels import check_ranks, full, judged, present_first
from newton_plugin.algorithms._sorting.methods import Method, matrix, places, resolve, with_lengths

__all__ = ["soft_rank", "spearman_loss"]


def soft_rank(scores: Tensor, method: Method = "neural_sort", **kwargs: Any) -> Tensor:
    r"""Differentiable ranks, 0 = smallest.

    .. math:: r_j = \sum_i i \, P_{ij} \Big/ \sum_i P_{ij}

    The columns of NeuralSort and SoftSort do not sum to one, hence the denominator. It is at least 1/n, because every
    element is the largest in a row of its own. The columns of a sorting network sum to one, and ``P`` is
    never formed: one vector goes back through the layers.

    Args:
        scores: (..., n), floating point.
        method: as in ``RankingLoss``; any callable ``scores -> P`` will do.
        **kwargs: given to a method given by name, e.g. ``temperature=0.1``.

    Returns:
        ranks (..., n), in the dtype of the scores.

    Source: Petersen et al., ICML 2021 (networks); Grover et al., ICLR 2019, for P as expected permutation.

    >>> soft_rank(torch.tensor([3.0, 1.0, 2.0]), temperature=0.001).tolist()
    [2.0, 0.0, 1.0]
    >>> soft_rank(torch.tensor([5.0, 5.0]), "sorting_network").tolist()
    [0.5, 0.5]
    """
    check_scores(scores)
    return _soft_rank(full(scores), resolve(method, kwargs)).to(scores.dtype)


def _soft_rank(scores: Tensor, method: Any, lengths: Tensor | None = None) -> Tensor:
    """Ranks (..., n); with ``lengths`` (...,), 0 for those that are not real."""
    if hasattr(method, "ranks"):
        if lengths is None:
            return method.ranks(scores)
        ranks = with_lengths(method, lambda: method.ranks(scores, lengths))
        return torch.where(places(lengths, scores.shape[-1]), ranks, 0.0)
    p = matrix(method, scores, lengths=lengths)
    rows = torch.arange(scores.shape[-1], device=scores.device, dtype=p.dtype).unsqueeze(-1)
    total, weight = (rows * p).sum(-2), p.sum(-2)
    if lengths is not None:
        weight = torch.where(places(lengths, scores.shape[-1]), weight, 1.0)
    return total / weight


def spearman_loss(
    scores: Tensor, ranks: Tensor, method: Method = "neural_sort", *, mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    r"""One minus Spearman's rank correlation of the soft ranks with the true ones, mean over the lists.

    .. math:: 1 - \rho = \frac{6}{n (n^2 - 1)} \sum_j (r_j - \text{rank}_j)^2

    This is Spearman's formula for soft ranks: 0 for the right order, 2 for the reversed one, without a division by a
    variance that may vanish. Tied true ranks are replaced by their mean, as is usual.

    Args:
        scores: (..., n), floating point.
        ranks: (..., n), integers, 0 = smallest; only their order counts.
        method, **kwargs: as in ``soft_rank``.
        mask: (..., n), boolean, true where there is an element; masked scores and ranks may hold anything. Each list
            then has the loss that it has alone (0 if it has no or one element), and every list counts the same.

    The result is in the dtype of the scores (float32 for half precision).

    Raises:
        ArgumentError: a rank is negative. (On a device, in compiled code and under ``torch.func`` the host does not
            look: the loss is NaN.)
        ArgumentTypeError: ranks are not integers; the method knows no mask.
        ShapeError: shapes differ.

    Source: Spearman, "The proof and measurement of association between two things", 1904; as a loss on soft
    ranks: Blondel, Teboul, Berthet, Djolonga, "Fast differentiable sorting and ranking", ICML 2020, section
    6.

    >>> scores, ranks = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0, 1, 2])
    >>> round(spearman_loss(scores, ranks, temperature=0.01).item(), 6)
    2.0
    """
    verdict = check_ranks(scores, ranks, mask)
    s, ranks, n, lengths = full(scores), ranks.long(), scores.shape[-1], None
    if mask is not None:
        order, lengths = present_first(mask)
        s = s.masked_fill(~mask, 0.0).gather(-1, order)
        ranks = ranks.masked_fill(~mask, torch.iinfo(torch.long).max).gather(-1, order)
    soft = _soft_rank(s, resolve(method, kwargs), lengths)
    below = (ranks.unsqueeze(-1) > ranks.unsqueeze(-2)).sum(-1)
    upto = (ranks.unsqueeze(-1) >= ranks.unsqueeze(-2)).sum(-1)
    if lengths is None:
        true = (below + upto - 1).to(soft.dtype) / 2
        each = judged((soft - true).square().sum(-1), verdict)
        return each.mean() * (6 / max(n * (n * n - 1), 1))
    # Masked ranks are above all others. Of those that are not masked, upto and below count the others that are not.
    true = torch.where(places(lengths, n), (below + upto - 1).to(soft.dtype) / 2, 0.0)
    m = lengths.to(soft.dtype)
    each = (soft - true).square().sum(-1) * (6 / (m * (m * m - 1)).clamp(min=1))
    return judged(each, verdict).mean()
