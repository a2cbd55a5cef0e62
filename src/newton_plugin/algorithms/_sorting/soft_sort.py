"""SoftSort: row i of P says which elements have the i-th sorted score.

The element of rank i is the one whose score *is* the i-th sorted score. Softened, row i of ``P`` is a softmax
of the distances between the i-th sorted score and all scores::

    P_ij = softmax over j of  -|sort(s)_i - s_j|^p / temperature

An element at its own rank has distance 0, the largest logit of its row, so nothing needs to be shifted, and
towards temperature 0 the row becomes the indicator of that element. ``P`` is row-stochastic; where scores
crowd, columns exceed one.

The gradient flows through ``sort(s)`` too: moving one score moves the row of its rank. Where scores tie, the
sorted values are taken from the tied elements in the order of the list, as in a stable sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin._errors import check_choice, check_positive
from newton_plugin.algorithms._list_loss.chunks import InChunks
from newton_plugin.algorithms._list_loss.row_logits import SoftSortLogits
from newton_plugin.algorithms._list_loss.row_loss import row_losses
from newton_plugin.algorithms._list_loss.scores import check_scores
from newton_plugin.algorithms._log_domain import log_softmax_and_complement, log_zero, wide

__all__ = ["SoftSort", "soft_sort"]


def soft_sort(scores: Tensor, temperature: float, p: int = 1) -> Tensor:
    r"""Soft permutation matrix of ``scores``, ascending.

    .. math:: P_{ij} = \operatorname{softmax}_j\big(-|\operatorname{sort}(s)_i - s_j|^p/\tau\big)

    Args:
        scores: (..., n), floating point.
        temperature: sharpness, > 0; towards 0, ``P @ scores`` becomes ``torch.sort(scores)``.
        p: 1 or 2, the power of the distance.

    Returns:
        P: (..., n, n), rows are ranks (smallest first) and sum to one, columns are the elements of
        ``scores``; same dtype as ``scores``.

    Raises:
        ArgumentError, ArgumentTypeError: temperature is not a positive number; p is not 1 or 2; scores are
            not floating point.
        ShapeError: scores have no list dimension.

    Source: Prillo, Eisenschlos, "SoftSort: a continuous relaxation for the argsort operator", ICML 2020,
    equation 4 (there descending).

    Two scores a distance d apart: each row is a logistic function of d/temperature.

    >>> P = soft_sort(torch.tensor([1.0, 0.0], dtype=torch.float64), temperature=1.0)
    >>> torch.allclose(P[0, 1], torch.sigmoid(torch.tensor(1.0, dtype=torch.float64)))
    True
    >>> x = torch.tensor([3.0, 1.0, 2.0])
    >>> (soft_sort(x, temperature=0.001) @ x).tolist()
    [1.0, 2.0, 3.0]
    """
    return SoftSort(temperature, p)(scores)


class SoftSort:
    """SoftSort at a fixed temperature, as a method object: P, its first rows, or its logarithms."""

    def __init__(self, temperature: float, p: int = 1) -> None:
        self.temperature = check_positive("temperature", temperature, "Smaller is sharper, e.g. 0.1.")
        check_choice("p", p, (1, 2), "It is the power of the distance.")
        self.p = p

    def __repr__(self) -> str:
        return f"SoftSort(temperature={self.temperature}, p={self.p})"

    def __call__(self, scores: Tensor) -> Tensor:
        """P: scores (..., n) -> (..., n, n)."""
        return self.rows(scores, scores.shape[-1] if scores.ndim else 0)

    def rows(self, scores: Tensor, k: int, lengths: Tensor | None = None) -> Tensor:
        """The first k rows of P: scores (..., n) -> (..., k, n)."""
        check_scores(scores)
        s = scores.float() if scores.element_size() < 4 else scores
        if self.p == 2:
            s = 0.5 * s  # so that the difference of two finite numbers is finite; the factor 4 comes back below
        absent = _absent(s, lengths)
        in_order = s.sort(dim=-1, stable=True).values if absent is None else _in_order(s, absent)
        if k < s.shape[-1]:
            in_order = in_order[..., :k]
        d = in_order.unsqueeze(-1) - s.unsqueeze(-2)
        if self.p == 1:
            # |d| as d times its sign, a constant: the derivative is then a single product.
            z = d * d.detach().sign().mul_(-1 / self.temperature)
        else:
            z = d * d * (-4 / self.temperature)
        if absent is not None:
            z = z.masked_fill(absent.unsqueeze(-2), log_zero(z))
        return torch.softmax(z, dim=-1).to(scores.dtype)

    def ranking(self, scores: Tensor, target: Tensor, lengths: Tensor | None = None) -> InChunks:
        """The ranking loss of lists (N, n), n >= 2, with its derivatives: see ``RankingLoss``."""
        return row_losses(lambda s, m: SoftSortLogits(s, self.temperature, self.p, m), scores, target, lengths)

    def log_probabilities(self, scores: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(log P, log(1 - P))``: scores (..., n), n >= 2 -> two of (..., n, n), in float64."""
        check_scores(scores)
        s = wide(scores)
        absent = _absent(s, lengths)
        in_order = _in_order(s, absent)
        distance = in_order.unsqueeze(-1) - s.unsqueeze(-2)
        z = (distance.abs() if self.p == 1 else distance.square()) * (-1 / self.temperature)
        if absent is not None:
            z = z.masked_fill(absent.unsqueeze(-2), log_zero(z))
        return log_softmax_and_complement(z)


def _absent(s: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Which places no list element fills, (..., n)."""
    return None if lengths is None else torch.arange(s.shape[-1], device=s.device) >= lengths.unsqueeze(-1)


def _in_order(s: Tensor, absent: Tensor | None) -> Tensor:
    """The scores sorted, absent ones at the end."""
    key = s.detach() if absent is None else s.detach().masked_fill(absent, torch.inf)
    return s.gather(-1, key.sort(dim=-1, stable=True).indices)
