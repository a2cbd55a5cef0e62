r"""The ranking loss of lists whose P is a softmax of each row, with its first and second derivatives written out.

One row: logits z, ``p = softmax(z)``, target t with sum 1, ``c = 1 - t``. With ``L = logsumexp(z)``, and ``L_j`` the
same without entry j, ``log p_j = z_j - L`` and ``log(1 - p_j) = L_j - L``. So the row's loss and its derivatives are::

    l      = -sum_j (t_j log p_j + c_j log(1 - p_j))
    g_k    = p_k - t_k + c_k p_k - p_k sum_{j != k} c_j u_j              u_j = p_j / (1 - p_j)
    H_kl   = -o_kl  (k != l)         H_kk = sum_{l != k} o_kl
    o_kl   = p_k p_l (1 + c_k + c_l - sum_{j != k,l} c_j h_j)            h_j = 1/(1 - p_j)^2 - 1

**Nothing cancels.** Adding a constant to a row changes nothing, so g sums to 0 and H is a Laplacian: both are given by
the entries *other* than the largest, z_1, and those have p <= 1/2, u <= 1, h <= 3. Those of the first may be infinite,
but enter as ``p_k u_1 = p_1 w_k`` and ``p_k p_l h_1 = p_1 (2 - p_1) w_k w_l``, where w is the softmax of the others
among themselves. The part of H in w is a Laplacian again, and is taken relative to *its* largest entry, z_2. So a
Hessian of 1e-30 comes out as 1e-30 and not as the rounding error of 1 - 1.

**In the scores.** ``o_kl = p_k p_l (b_k + b_l) - e w_k w_l`` with ``e = c_1 p_1 (2 - p_1)`` and
``b_k = c_k + c_k h_k + (1 - sum_j c_j h_j)/2`` (h_1 = 0). With ``J_k = dz_k/ds``, ``D_k = J_k - J_1`` and
``E_k = J_k - J_2``, over the others::

    J' H J = sum_k a_k D_k D_k' - (x y' + y x') - e (sum_k w_k E_k E_k' - v v')
    a_k = p_k (b_k + sum_l p_l b_l)     x = sum_k p_k b_k D_k     y = sum_k p_k D_k     v = sum_k w_k E_k

The last term is ``-e sum_k w_k J_k J_k'`` and a form in J_2 and ``j = sum_k w_k J_k``. With s the sum of these w
and ``r = sqrt(1 - s)``, that is a single product, symmetrised: ``e (j - r s/(1 + r) J_2) (j + r (1 + r) J_2)'``. For
all rows of a list together this is a handful of products of n x n matrices (``_row_logits`` has the J): O(n^3), and
no second differentiation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from newton_plugin.algorithms._row_logits import RowLogits

__all__ = ["RowLoss"]


class _Terms(NamedTuple):
    """What the loss of a row is made of; (..., n), or (..., 1) where it is one number a row."""

    first: Tensor  # index
    second: Tensor  # index
    p: Tensor  # 0 at the first
    p1: Tensor  # of the first
    w: Tensor  # 0 at the first
    log_p: Tensor
    log_q: Tensor


class RowLoss:
    """Loss, gradient and Hessian of each list, in the precision of the logits.

    Args:
        logits: of lists (N, n).
        target: T, (N, n, n).
        weight: of each row's loss, (N, n, 1) if not the same for all.
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
        first, second, p, p1, w, _, _ = self._terms
        c, odds, weight = self._other, self._odds, self._weight
        ch = odds + odds / (1 - p)
        b = c + ch + (1 - ch.sum(-1, keepdim=True)) / 2
        w = w.scatter(-1, second, 0.0)
        each = torch.stack((p, p * b, w), 1)
        sp, sb, s = each.sum(-1, keepdim=True).unbind(1)
        jp, jb, j = self._logits.combine(each).unbind(1)
        j1, j2 = self._logits.rows(first), self._logits.rows(second)
        pb = each[:, 1]
        mean_b = sb + p1 * b.gather(-1, first)  # so a = pb + mean_b p
        e = c.gather(-1, first) * p1 * (2 - p1)
        r = (1 - s).clamp_(min=0).sqrt()
        left = torch.cat((j1, jb - sb * j1, e * (j - r * s / (1 + r) * j2)), -2)
        right = torch.cat(
            (0.5 * (sb + mean_b * sp) * j1 - jb - mean_b * jp, sp * j1 - jp, 0.5 * (j + r * (1 + r) * j2)), -2
        )
        squares = torch.addcmul(pb, mean_b, p).addcmul_(e, w, value=-1)
        if isinstance(weight, Tensor):
            squares, right, weight = squares * weight, right * weight.repeat(1, 3, 1), 1.0
        half = left.mT @ right
        hessian = (self._logits.squares(squares) + (half + half.mT)) * weight
        bent = self._logits.bend(self._row_gradient)
        return self._logits.restore(hessian if bent is None else hessian + bent)


def _terms(z: Tensor) -> _Terms:
    """See ``_log_domain`` for the logarithms."""
    two, index = z.topk(2, dim=-1)
    (z1, z2), (first, second) = two.split(1, -1), index.split(1, -1)
    gap = z2 - z1
    others = (z - z2).scatter_(-1, first, -torch.inf).exp_()
    total = others.sum(-1, keepdim=True)
    ratio = gap.exp()
    rest = ratio * total
    log_total = rest.log1p()
    p1 = 1 / (1 + rest)
    p = others * (ratio * p1)
    log_q = torch.log1p(-p).scatter_(-1, first, gap + total.log() - log_total)
    return _Terms(first, second, p, p1, others / total, (z - z1) - log_total, log_q)
