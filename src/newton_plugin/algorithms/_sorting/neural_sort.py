"""NeuralSort: sorting written as n softmaxes, one per rank.

The sum of the k largest of n numbers is ``min_v k v + sum_j max(s_j - v, 0)``, so the element of a given rank
is an argmax over the list of a function that is linear in the scores and in their absolute differences.
NeuralSort softens each of these argmaxes. With ranks i = 1..n counted from the smallest::

    z_ij = ((2i - n - 1) s_j - sum_k |s_j - s_k|) / temperature        P = softmax over j

(the paper writes it for descending order, with n + 1 - 2i). Each row of ``P`` sums to one; the columns do
not, so two ranks may claim the same element.

**Rounding.** In sorted order the logit of the element at position r in row i is, relative to the row's
maximum, ``-(|s_r - s_i| + 2 sum_{k between} |s_r - s_k|)/temperature``: small differences of neighbours
decide, but the formula takes them from sums of n large numbers. For float32 scores of 1e4 and a temperature
of 0.1 these are 1e6, whose float32 spacing is 0.06. The logits are therefore formed and subtracted in float64
(float32 where the device has none) and cast back only as differences.

**Ties.** ``|s_j - s_k|`` has a kink at a tie. The derivative there is taken as 0, the mean of both sides, so
that tied elements are treated alike wherever they are in the list.
"""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin._errors import check_positive
from newton_plugin.algorithms._list_loss.chunks import InChunks
from newton_plugin.algorithms._list_loss.row_logits import NeuralSortLogits
from newton_plugin.algorithms._list_loss.row_loss import row_losses
from newton_plugin.algorithms._list_loss.scores import check_scores
from newton_plugin.algorithms._log_domain import log_softmax_and_complement, log_zero, wide

__all__ = ["NeuralSort", "neural_sort"]


def neural_sort(scores: Tensor, temperature: float) -> Tensor:
    r"""Soft permutation matrix of ``scores``, ascending.

    .. math:: P_i = \operatorname{softmax}_j\big(((2i - n - 1) s_j - \textstyle\sum_k |s_j - s_k|)/\tau\big)

    Args:
        scores: (..., n), floating point.
        temperature: sharpness, > 0; towards 0, ``P @ scores`` becomes ``torch.sort(scores)``.

    Returns:
        P: (..., n, n), rows are ranks (smallest first) and sum to one, columns are the elements of
        ``scores``; same dtype as ``scores``.

    Raises:
        ArgumentError, ArgumentTypeError: temperature is not a positive number; scores are not floating point.
        ShapeError: scores have no list dimension.

    Source: Grover, Wang, Zweig, Ermon, "Stochastic optimization of sorting networks via continuous
    relaxations", ICLR 2019, equation 5 (there descending).

    Three scores that are not in order; the temperature is small, so P is a permutation matrix:

    >>> x = torch.tensor([3.0, 1.0, 2.0])
    >>> P = neural_sort(x, temperature=0.01)
    >>> (P @ x).tolist()
    [1.0, 2.0, 3.0]

    Two scores: the difference of the logits is 2 (s_2 - s_1)/temperature, minus the two terms |s_1 - s_2|
    that cancel, so row 1 is the logistic function of the difference over the temperature:

    >>> P = neural_sort(torch.tensor([0.0, 1.0], dtype=torch.float64), temperature=1.0)
    >>> torch.allclose(P[0, 0], torch.sigmoid(torch.tensor(1.0, dtype=torch.float64)))
    True
    """
    return NeuralSort(temperature)(scores)


class NeuralSort:
    """NeuralSort at a fixed temperature, as a method object: P, its first rows, or its logarithms."""

    def __init__(self, temperature: float) -> None:
        self.temperature = check_positive("temperature", temperature, "Smaller is sharper, e.g. 0.1.")

    def __repr__(self) -> str:
        return f"NeuralSort(temperature={self.temperature})"

    def __call__(self, scores: Tensor) -> Tensor:
        """P: scores (..., n) -> (..., n, n)."""
        return self.rows(scores, scores.shape[-1] if scores.ndim else 0)

    def rows(self, scores: Tensor, k: int, lengths: Tensor | None = None) -> Tensor:
        """The first k rows of P: scores (..., n) -> (..., k, n)."""
        dtype = torch.float32 if scores.element_size() < 4 else scores.dtype
        n = scores.shape[-1] if scores.ndim else 0
        if lengths is not None or n <= 16 or dtype == torch.float64:
            return torch.softmax(self._logits(scores, k, lengths), dim=-1).to(scores.dtype)
        return torch.softmax(self._relative_logits(scores, k).to(dtype), dim=-1).to(scores.dtype)

    def log_probabilities(self, scores: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(log P, log(1 - P))``: scores (..., n), n >= 2 -> two of (..., n, n), in float64."""
        return log_softmax_and_complement(self._logits(scores, scores.shape[-1], lengths))

    def ranking(self, scores: Tensor, target: Tensor, lengths: Tensor | None = None) -> InChunks:
        """The ranking loss of lists (N, n), n >= 2, with its derivatives: see ``RankingLoss``."""
        return row_losses(lambda s, m: NeuralSortLogits(s, self.temperature, m), scores, target, lengths)

    def _logits(self, scores: Tensor, k: int, lengths: Tensor | None = None) -> Tensor:
        check_scores(scores)
        s = wide(scores) / self.temperature
        n = s.shape[-1]
        coefficient = torch.arange(1 - n, 1 - n + 2 * k, 2, device=s.device, dtype=s.dtype).unsqueeze(-1)
        if lengths is None:
            distance = _distance_by_pairs(s) if n <= 64 else _distance_by_sums(*s.sort(-1))
            return torch.addcmul(-distance.unsqueeze(-2), coefficient, s.unsqueeze(-2))
        present = torch.arange(n, device=s.device) < lengths.unsqueeze(-1)
        pairs = (s.unsqueeze(-1) - s.unsqueeze(-2)).abs() * present.unsqueeze(-2)
        coefficient = coefficient + (n - lengths)[..., None, None]
        z = coefficient * s.unsqueeze(-2) - pairs.sum(-1).unsqueeze(-2)
        return z.masked_fill(~present.unsqueeze(-2), log_zero(z))

    def _relative_logits(self, scores: Tensor, k: int) -> Tensor:
        """The logits minus the maximum of each row, in float64. For these differences float32 has enough digits.

        The maximum of row i is at the i-th sorted score t_i, and there ``z = t_i - 2 C_i + C_n`` with sign
        changed, where C are the cumulative sums of t: put ``sum_k |t_i - t_k| = (2i - n) t_i - 2 C_i + C_n``
        into z.
        """
        check_scores(scores)
        s = wide(scores) / self.temperature
        n = s.shape[-1]
        coefficient = torch.arange(1 - n, 1 - n + 2 * k, 2, device=s.device, dtype=s.dtype).unsqueeze(-1)
        t, order = s.sort(-1)
        # The softmax does not depend on the maximum of a row, so it enters as a constant.
        key = t.detach()
        sums = key.cumsum(-1)
        minus_max = (key - 2 * sums + sums[..., -1:])[..., :k].unsqueeze(-1)
        # Both ways give the same numbers. For few scores, fewer and simpler operations are faster; for many, fewer
        # passes over memory (measured on a CPU).
        if s.numel() * n <= 2**17:
            z = torch.addcmul(-_distance_by_pairs(s).unsqueeze(-2), coefficient, s.unsqueeze(-2))
            return z.add_(minus_max)
        one = torch.ones_like(minus_max)
        left = torch.cat((coefficient.expand_as(one), one, minus_max), -1)
        return left @ torch.stack((s, -_distance_by_sums(t, order), torch.ones_like(s)), -2)


def _distance_by_pairs(s: Tensor) -> Tensor:
    """``sum_k |s_j - s_k|`` for every j, with the derivative 0 at ties."""
    return (s.unsqueeze(-1) - s.unsqueeze(-2)).abs().sum(-1)


def _distance_by_sums(t: Tensor, order: Tensor) -> Tensor:
    """The same in O(n log n), from ``t, order = s.sort(-1)``.

    With ``below`` elements smaller than t_r and ``upto`` not larger, it is ``(below + upto - n) t_r`` minus the
    sum of the smaller plus the sum of the larger elements; tied elements are in neither sum. A run of ties starts
    where t grows: ``below`` is the last such place at or before r, ``upto`` the next one after it.
    """
    n = t.shape[-1]
    place = torch.arange(n, device=t.device)
    grows = t[..., 1:].detach() > t[..., :-1].detach()
    starts = torch.nn.functional.pad(grows * place[1:], (1, 0))
    ends = torch.nn.functional.pad(grows * (n - place[1:]), (0, 1))  # counted from the other end
    below = starts.cummax(-1).values
    upto = n - ends.flip(-1).cummax(-1).values.flip(-1)
    sums = torch.nn.functional.pad(t.cumsum(-1), (1, 0))
    far = sums.gather(-1, below) + sums.gather(-1, upto)
    distance = (below + upto - n) * t - far + sums[..., -1:]
    back = torch.zeros_like(order).scatter(-1, order, place.expand_as(order))
    return distance.gather(-1, back)
