"""soft_top_k: which elements are the k largest, and in which order."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError
from newton_plugin.algorithms._list_loss.scores import check_scores
from newton_plugin.algorithms._sorting.methods import Method, matrix, resolve

__all__ = ["soft_top_k", "top_rows"]


def soft_top_k(
    scores: Tensor, k: int, method: Method = "neural_sort", *, largest: bool = True, **kwargs: Any
) -> Tensor:
    """The rows of the soft permutation matrix that belong to the k largest (or smallest) elements.

    Only these rows are computed: O(k n) for NeuralSort and SoftSort; for a sorting network k unit vectors go
    back through the layers. Sum the rows for a soft membership in the top k.

    Args:
        scores: (..., n), floating point.
        k: 1 <= k <= n.
        method, **kwargs: as in ``RankingLoss``. Of another callable all rows of P are computed, and k are kept.
        largest: row 0 is the largest element; if false, the smallest.

    Returns:
        (..., k, n): rows sum to one; towards temperature 0, ``soft_top_k(x, k) @ x`` is ``torch.topk(x, k)``.

    Raises:
        ArgumentError, ArgumentTypeError: k is not an integer from 1 to n.

    Source: Grover et al., ICLR 2019, section 6.3 (top-k by rows of P).

    >>> import torch
    >>> x = torch.tensor([3.0, 1.0, 2.0])
    >>> (soft_top_k(x, 2, temperature=0.01) @ x).tolist()
    [3.0, 2.0]
    """
    return top_rows(-scores if largest else scores, k, method, kwargs)


def top_rows(
    scores: Tensor, k: int, method: Method, arguments: dict[str, Any], lengths: Tensor | None = None
) -> Tensor:
    """The first k rows of P, (..., k, n); with ``lengths`` (...,) as in ``matrix``."""
    check_scores(scores)
    _check_k(k, scores.shape[-1])
    return matrix(resolve(method, arguments), scores, k, lengths)


def _check_k(k: int, n: int) -> None:
    """Raise unless 1 <= k <= n."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise ArgumentTypeError(f"k must be an int; got {k!r}.")
    if not 1 <= k <= n:
        raise ArgumentError(f"k must be from 1 to the length of the lists, {n}; got {k}.")
