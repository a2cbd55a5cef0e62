"""Soft ranks, and Spearman's rank correlation as a loss.

Row i of a permutation matrix says which element has rank i, so column j says which rank element j has. A soft
permutation matrix therefore gives every element an expected rank, ``sum_i i P_ij``, between 0 and n - 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentTypeError, ShapeError, check_floating
from newton_plugin.algorithms._list_loss.scores import check_scores
from newton_plugin.algorithms._sorting.methods import Method, matrix, resolve

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
    built = resolve(method, kwargs)
    if hasattr(built, "ranks"):
        return built.ranks(scores)
    p = matrix(built, scores)
    places = torch.arange(scores.shape[-1], device=scores.device, dtype=p.dtype).unsqueeze(-1)
    return (places * p).sum(-2) / p.sum(-2)


def spearman_loss(scores: Tensor, ranks: Tensor, method: Method = "neural_sort", **kwargs: Any) -> Tensor:
    r"""One minus Spearman's rank correlation of the soft ranks with the true ones, mean over the lists.

    .. math:: 1 - \rho = \frac{6}{n (n^2 - 1)} \sum_j (r_j - \text{rank}_j)^2

    This is Spearman's formula for soft ranks: 0 for the right order, 2 for the reversed one, without a division by a
    variance that may vanish. Tied true ranks are replaced by their mean, as is usual.

    Args:
        scores: (..., n), floating point.
        ranks: (..., n), integers, 0 = smallest; only their order counts.
        method, **kwargs: as in ``soft_rank``.

    Raises:
        ArgumentTypeError: ranks are not integers.
        ShapeError: shapes differ.

    Source: Spearman, "The proof and measurement of association between two things", 1904; as a loss on soft
    ranks: Blondel, Teboul, Berthet, Djolonga, "Fast differentiable sorting and ranking", ICML 2020, section
    6.

    >>> scores, ranks = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0, 1, 2])
    >>> round(spearman_loss(scores, ranks, temperature=0.01).item(), 6)
    2.0
    """
    check_floating("scores", scores)
    if not isinstance(ranks, Tensor) or ranks.is_floating_point():
        raise ArgumentTypeError(
            "ranks must be a tensor of integers, 0 = smallest. From values, take values.argsort(-1).argsort(-1)."
        )
    if scores.shape != ranks.shape:
        raise ShapeError(
            f"scores and ranks must have the same shape (..., n); got {tuple(scores.shape)} and {tuple(ranks.shape)}."
        )
    soft = soft_rank(scores, method, **kwargs)
    below = (ranks.unsqueeze(-1) > ranks.unsqueeze(-2)).sum(-1)
    upto = (ranks.unsqueeze(-1) >= ranks.unsqueeze(-2)).sum(-1)
    true = (below + upto - 1).to(soft.dtype) / 2
    n = scores.shape[-1]
    return (soft - true).square().sum(-1).mean() * (6 / max(n * (n * n - 1), 1))
