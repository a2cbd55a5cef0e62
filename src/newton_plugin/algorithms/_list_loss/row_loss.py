r"""The ranking loss of lists whose P is a softmax of each row, with its first and second derivatives written out.

One row: logits z, ``p = softmax(z)``, target t with sum 1, ``c = 1 - t``. With ``L = logsumexp(z)``, and ``L_j`` the
same without entry j, ``log p_j = z_j - L`` and ``log(1 - p_j) = L_j - L``. So the row's loss and its derivatives are::

    l      = -sum_j (t_j log p_j + c_j log(1 - p_j))
    g_k    = p_k - t_k + c_k p_k - p_k sum_{j != k} c_j u_j              u_j = p_j / (1 - p_j)
    H_kl   = -o_kl  (k != l)         H_kk = sum_{l != k} o_kl
    o_kl   = p_k p_l (1 + c_k + c_l - sum_{j != k,l} c_j h_j)            h_j = 1/(1 - p_j)^2 - 1

**Nothing cancels.** Adding a constant to a row changes nothing, so g sums to 0 and H is a Laplacian. Both are therefore
determined by the entries *other* than that of the largest logit, z_1, and for these p <= 1/2, u <= 1, h <= 3. u_1 and
h_1 may be infinite, but they enter only as ``p_k u_1 = p_1 w_k`` and ``p_k p_l h_1 = p_1 (2 - p_1) w_k w_l``, where w
is the softmax of the others among themselves. The part of H in w is a Laplacian again; it is taken relative to *its*
largest entry, z_2. So a Hessian of 1e-30 comes out as 1e-30 and not as the rounding error of 1 - 1.

**In the scores.** ``o_kl = p_k p_l (b_k + b_l) - e w_k w_l`` with ``e = c_1 p_1 (2 - p_1)`` and
``b_k = c_k + c_k h_k + (1 - sum_j c_j h_j)/2`` (h_1 = 0). With ``J_k = dz_k/ds``, ``D_k = J_k - J_1`` and
``E_k = J_k - J_2``, over the others::

    J' H J = sum_k a_k D_k D_k' - (x y' + y x') - e (sum_k w_k E_k E_k' - v v')
    a_k = p_k (b_k + sum_l p_l b_l)     x = sum_k p_k b_k D_k     y = sum_k p_k D_k     v = sum_k w_k E_k

With the sums over the others ``S = sum_k p_k = 1 - p_1``, ``B = sum_k p_k b_k``, ``jp = sum_k p_k J_k`` and
``jb = sum_k p_k b_k J_k``, the first two terms multiplied out are squares of single J and two symmetrised products::

    sum_k a_k J_k J_k' + p_1 (B + b_1 S) J_1 J_1' - jb jp' - jp jb' - p_1 (J_1 (jb + b_1 jp)' + (jb + b_1 jp) J_1')

The last term is ``-e sum_k w_k J_k J_k'`` and a quadratic form in J_2 and ``j = sum_k w_k J_k``, over all but z_1 and
z_2. With s the sum of these w and ``r = sqrt(1 - s)``, the form is a single product, symmetrised:
``e (j - r s/(1 + r) J_2) (j + r (1 + r) J_2)'``. For all rows of a list together this is two or three products of
n x n matrices, and sums: O(n^3), and no second differentiation. The J are in ``row_logits.py`` and
``_sorting_network/logits.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from newton_plugin.algorithms._list_loss.chunks import InChunks, chunk_of
from newton_plugin.algorithms._list_loss.function import row_weight
from newton_plugin.algorithms._list_loss.row_logits import RowLogits
from newton_plugin.algorithms._log_domain import wide

__all__ = ["RowLoss", "row_losses"]


class _Terms(NamedTuple):
    """What the loss of a row is computed from, (..., n); or (..., 1) if there is one number for each row."""

    first: Tensor  # index of z_1
    second: Tensor  # index of z_2
    p: Tensor  # 0 at the first
    p1: Tensor  # p of the first
    w: Tensor  # 0 at the first
    log_p: Tensor
    log_q: Tensor


def row_losses(
    logits: Callable[[Tensor, Tensor | None], RowLogits], scores: Tensor, target: Tensor, lengths: Tensor | None
) -> InChunks:
    """The :class:`RowLoss` of lists (N, n), chunk by chunk.

    Args:
        logits: from scores, in the precision to work in, and lengths of some lists to their logits.
        scores: (N, n).
        target: (N, n, n).
        lengths: (N,) or None.
    """
    s, weight = wide(scores), row_weight(scores, lengths)

    def part(lists: slice) -> RowLoss:
        some = weight[lists] if isinstance(weight, Tensor) else weight
        return RowLoss(logits(s[lists], None if lengths is None else lengths[lists]), target[lists], some)

    # About a dozen n x n matrices of each list are in use at a time; a chunk is as many lists as a cache holds two of.
    return InChunks(part, s.shape[0], chunk_of(s, 2 * s.shape[-1] ** 2), keep=True)


class RowLoss:
    """Loss, gradient and Hessian of each list, in the precision of the logits.

    Args:
        logits: of lists (N, n).
        target: T, (N, n, n).
        weight: of each row's loss; (N, n, 1) where rows differ.
    """

    def __init__(self, logits: RowLogits, target: Tensor, weight: Tensor | float) -> None:
        self._logits, self._weight = logits, weight
        self._terms = terms = _terms(logits.z)
        target = logits.columns(target)
        self._other = other = 1 - target
        self.loss = -(torch.addcmul(target * terms.log_p, other, terms.log_q) * weight).sum((-2, -1))
        """(N,)"""
        self._odds = other * terms.p / (1 - terms.p)  # c u
        self._row_gradient = self._by_row(target)
        self.gradient = logits.pull(self._row_gradient)
        """(N, n)"""

    def _by_row(self, target: Tensor) -> Tensor:
        """``weight * g``, (N, n, n)."""
        first, _, p, p1, w, _, _ = self._terms
        c, odds = self._other, self._odds
        g = torch.addcmul(-target, p, c + odds + (1 - odds.sum(-1, keepdim=True)))
        g.addcmul_(c.gather(-1, first) * p1, w, value=-1)
        g.scatter_(-1, first, 0.0).mul_(self._weight)
        return g.scatter_(-1, first, -g.sum(-1, keepdim=True))

    def hessian(self) -> Tensor:
        """(N, n, n), exactly symmetric."""
        some = max(1, self._logits.at_once)
        starts = range(0, max(1, len(self._other)), some)
        parts = [self._hessian(slice(start, start + some)) for start in starts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _hessian(self, lists: slice) -> Tensor:
        first, second, p, p1, w = (term[lists] for term in self._terms[:5])
        c, odds, row_gradient = (t[lists] for t in (self._other, self._odds, self._row_gradient))
        weight = self._weight[lists] if isinstance(self._weight, Tensor) else self._weight
        logits = self._logits.part(lists)
        ch = odds + odds / (1 - p)
        b = c + ch + (1 - ch.sum(-1, keepdim=True)) / 2
        w = w.scatter(-1, second, 0.0)
        each = torch.stack((p, p * b, w), 1)
        sp, sb, s = each.sum(-1, keepdim=True).unbind(1)
        jp, jb, j = logits.combine(each).unbind(1)
        j2 = logits.rows(second)
        pb = each[:, 1]
        b1 = b.gather(-1, first)
        mean_b = torch.addcmul(sb, p1, b1)  # so a = pb + mean_b p
        e = c.gather(-1, first) * p1 * (2 - p1)
        r = (1 - s).clamp_(min=0).sqrt()
        squares = torch.addcmul(pb, mean_b, p).addcmul_(e, w, value=-1).scatter_(-1, first, p1 * (sb + b1 * sp))
        across = torch.addcmul(jb, b1, jp).mul_(p1)
        left = j - (r * s / (1 + r)) * j2
        right = torch.addcmul(j, r * (1 + r), j2).mul_(0.5 * e)
        if isinstance(weight, Tensor):
            squares, across, right, jp = squares * weight, across * weight, right * weight, jp * weight
        half = logits.outer(first, across).baddbmm_(jb.mT, jp).neg_().baddbmm_(left.mT, right)
        hessian = logits.squares(squares).add_(half + half.mT)
        if not isinstance(weight, Tensor):
            hessian.mul_(weight)
        of_logits = logits.second_derivative(row_gradient)
        if of_logits is not None:
            hessian.add_(of_logits)
        return logits.restore(hessian)


def _log_least(z: Tensor) -> float:
    """The logarithm below which a number counts as 0 beside 1; products of two such numbers are still normal."""
    return math.log(torch.finfo(z.dtype).tiny) / 2


def _terms(z: Tensor) -> _Terms:
    """The terms of the rows of z; ``_log_domain.py`` explains the logarithms."""
    two, index = z.topk(2, dim=-1)
    (z1, z2), (first, second) = two.split(1, -1), index.split(1, -1)
    gap = z2 - z1
    # Subnormal numbers are slow to compute with; beside exp(0), the entry of z_2, they count as 0.
    others = torch.threshold_(z - z2, _log_least(z), -torch.inf).scatter_(-1, first, -torch.inf).exp_()
    total = others.sum(-1, keepdim=True)
    ratio = gap.exp()
    rest = ratio * total
    log_total = rest.log1p()
    p1 = 1 / (1 + rest)
    p = torch.threshold_(others * (ratio * p1), torch.finfo(z.dtype).tiny / torch.finfo(z.dtype).eps, 0.0)
    log_q = torch.log1p(-p).scatter_(-1, first, gap + total.log() - log_total)
    return _Terms(first, second, p, p1, others / total, (z - z1) - log_total, log_q)
