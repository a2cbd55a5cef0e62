"""The logits of NeuralSort and SoftSort as functions of the scores, with their derivatives.

Both sorts are a row-softmax of logits z (row i = rank, column k = element) that are piecewise linear in the scores
(SoftSort with p = 2: quadratic). Between ties the Jacobian ``J_ik = dz_ik/ds``, a vector for each entry, has so much
structure that it is never formed:

* NeuralSort: ``J_ik = d_ik e_k + G_k`` with ``G_ka = sign(s_k - s_a)`` and ``d_ik = 2i - n - 1 - sum_a G_ka``;
* SoftSort, in sorted order: ``J_ik = -g_ik (e_i - e_k)`` with ``g_ik = sign(t_i - t_k)``; for p = 2, ``2 (t_i - t_k)``.

All of these are divided by the temperature. At a tie the sign is 0, as in autograd.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from newton_plugin.algorithms._log_domain import log_zero

__all__ = ["LinearLogits", "NeuralSortLogits", "RowLogits", "SoftSortLogits"]


class LinearLogits(Protocol):
    """The first and second derivatives of the logits z of N lists of length n."""

    def combine(self, weights: Tensor) -> Tensor:
        """``sum_k weights_ik J_ik`` for each row: (N, r, n, n) -> (N, r, n, n)."""
        ...

    def rows(self, index: Tensor) -> Tensor:
        """``J_ik`` with one k for each row i: (N, n, 1) -> (N, n, n)."""
        ...

    def outer(self, index: Tensor, right: Tensor) -> Tensor:
        """``sum_i J_ik right_i'`` with one k for each row i: (N, n, 1), (N, n, n) -> (N, n, n)."""
        ...

    def squares(self, weights: Tensor) -> Tensor:
        """``sum_ik weights_ik J_ik J_ik'``: (N, n, n) -> (N, n, n), exactly symmetric."""
        ...

    def second_derivative(self, gradient: Tensor) -> Tensor | None:
        """``sum_ik gradient_ik d2 z_ik / ds2``, with the gradient given to :meth:`RowLogits.pull`; None if it is 0."""
        ...

    def restore(self, hessian: Tensor) -> Tensor:
        """Rows and columns of (N, n, n) back in the order of the scores."""
        ...


class RowLogits(Protocol):
    """The logits z of lists (N, n), and the ways of their derivatives."""

    z: Tensor
    """(N, n, n)"""

    @property
    def at_once(self) -> int:
        """How many lists are differentiated twice at a time."""
        ...

    def columns(self, matrix: Tensor) -> Tensor:
        """A matrix (N, n, n) whose columns are elements, its columns put in the order of those of z."""
        ...

    def pull(self, gradient: Tensor) -> Tensor:
        """``sum_ik gradient_ik J_ik``: (N, n, n) -> (N, n), for rows that sum to 0."""
        ...

    def part(self, lists: slice) -> LinearLogits:
        """The derivatives of these lists; :meth:`pull` comes first."""
        ...


class NeuralSortLogits:
    """NeuralSort's; the derivatives are in the module's docstring. The columns of z are in sorted order.

    In that order ``G_ka`` is 1 behind the elements that are tied with a, -1 before them and 0 among them. So products
    with G are differences of cumulative sums.

    Args:
        scores: (N, n), in the precision to work in.
        temperature: of the sort.
        lengths: (N,); only the first so many elements of each list are real.
    """

    def __init__(self, scores: Tensor, temperature: float, lengths: Tensor | None = None) -> None:
        self._temperature = temperature
        n = scores.shape[-1]
        absent = None if lengths is None else torch.arange(n, device=scores.device) >= lengths.unsqueeze(-1)
        self._order = _sorted_order(scores, absent)
        self._t = t = scores.gather(-1, self._order) / temperature
        place = torch.arange(1 - n, n, 2, device=t.device, dtype=t.dtype).unsqueeze(-1)
        sign = t.unsqueeze(-1) - t.unsqueeze(-2)
        distance = sign.abs()
        self._sign = sign.sign_()
        self._present: Tensor | None = None
        if absent is None:
            self.z = torch.addcmul(-distance.sum(-1).unsqueeze(-2), place, t.unsqueeze(-2))
        else:
            assert lengths is not None
            self._present = present = ~absent
            sign.mul_(present.unsqueeze(-2)).mul_(present.unsqueeze(-1))
            distance = (distance * present.unsqueeze(-2)).sum(-1).unsqueeze(-2)
            place = place + (n - lengths)[:, None, None]
            z = place * t.unsqueeze(-2) - distance
            self.z = z.masked_fill_(absent.unsqueeze(-2), log_zero(z))
        self._own = place - sign.sum(-1).unsqueeze(-2)

    @cached_property
    def _ends(self) -> tuple[Tensor, Tensor] | None:
        """The first and the last place that each element is tied with, (N, n) each; None if there are no ties."""
        tied = self._t[:, 1:] == self._t[:, :-1]
        if self._present is not None:
            tied = tied & self._present[:, 1:]
        if tied.device.type == "cpu" and not tied.any():  # on a device, looking costs more than it saves
            return None
        place = torch.arange(self._t.shape[-1], device=tied.device)
        first = torch.nn.functional.pad(~tied * place[1:], (1, 0)).cummax(-1).values
        back = torch.nn.functional.pad(~tied * (place[-1] - place[:-1]), (0, 1)).flip(-1).cummax(-1).values
        return first, place[-1] - back.flip(-1)

    @property
    def at_once(self) -> int:
        return len(self.z)

    def part(self, lists: slice) -> NeuralSortLogits:
        return self

    def columns(self, matrix: Tensor) -> Tensor:
        return matrix.gather(-1, self._order.unsqueeze(-2).expand_as(matrix))

    def pull(self, gradient: Tensor) -> Tensor:
        spread = (gradient.sum(-2).unsqueeze(-2) @ self._sign).squeeze(-2)
        along = ((gradient * self._own).sum(-2) + spread) / self._temperature
        return torch.zeros_like(along).scatter_(-1, self._order, along)

    def combine(self, weights: Tensor) -> Tensor:
        upto = weights.cumsum(-1)
        if self._ends is None:
            spread = torch.add(weights, upto[..., -1:]).sub_(upto, alpha=2)
        else:
            first, last = (end[:, None, None].expand_as(weights) for end in self._ends)
            spread = upto[..., -1:] - upto.gather(-1, last)
            spread.sub_(upto.sub_(weights).gather(-1, first))
        return spread.addcmul_(weights, self._own.unsqueeze(1))

    def rows(self, index: Tensor) -> Tensor:
        t = self._t.unsqueeze(-2)
        rows = (self._t.gather(-1, index.squeeze(-1)).unsqueeze(-1) - t).sign_()
        return rows.scatter_add_(-1, index, self._own.gather(-1, index))

    def outer(self, index: Tensor, right: Tensor) -> Tensor:
        if self._ends is not None or not _is_own_place(index):
            return self.rows(index).mT @ right
        upto = right.cumsum(-2)
        own = self._own.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        return torch.add(right, upto[:, -1:]).sub_(upto, alpha=2).addcmul_(own, right)

    def squares(self, weights: Tensor) -> Tensor:
        r"""With ``J = d_k e_k + G_k``, W, L, D the sums over rows of ``weights``, times d, times d^2::

            diag(D) + (L_a G_ab + L_b G_ba) + sum_k W_k G_ka G_kb

        The last sum is all of W, minus twice what lies between a and b, minus what is tied with either. For a before b
        it is ``sum W + h_a - h_b``, where h_a is the sum of W before a's ties plus the sum up to the last of them. For
        a tied with b it is ``sum W`` minus the W of the ties.
        """
        linear = weights * self._own
        total, of_linear = weights.sum(-2), linear.sum(-2)
        upto = total.cumsum(-1)
        below, behind = upto - total, upto
        if self._ends is not None:
            below, behind = (side.gather(-1, end) for side, end in zip((below, behind), self._ends, strict=True))
        slope = of_linear - below - behind
        result = (slope.unsqueeze(-1) - slope.unsqueeze(-2)).mul_(self._sign).add_(upto[:, -1, None, None])
        result.sub_((self._sign == 0) * (behind - below).unsqueeze(-1))
        result.diagonal(dim1=-2, dim2=-1).add_(linear.mul_(self._own).sum(-2))
        return result

    def second_derivative(self, gradient: Tensor) -> Tensor | None:
        return None

    def restore(self, hessian: Tensor) -> Tensor:
        if self._present is not None:
            hessian = hessian * self._present.unsqueeze(-1) * self._present.unsqueeze(-2)
        return _unsorted(hessian, self._order).div_(self._temperature**2)


class SoftSortLogits:
    """SoftSort's; the derivatives are in the module's docstring. The columns of z are in sorted order.

    Args:
        scores, temperature, lengths: see :class:`NeuralSortLogits`.
        p: the power of the distance, 1 or 2.
    """

    def __init__(self, scores: Tensor, temperature: float, p: int, lengths: Tensor | None = None) -> None:
        n = scores.shape[-1]
        absent = None if lengths is None else torch.arange(n, device=scores.device) >= lengths.unsqueeze(-1)
        self._order = _sorted_order(scores, absent)
        t = scores.gather(-1, self._order)
        distance = t.unsqueeze(-1) - t.unsqueeze(-2)
        if p == 1:
            self._slope, self._slope_of_slope = distance.sign() / -temperature, 0.0  # dz_ik / dt_i
            z = distance * self._slope
        else:
            self._slope, self._slope_of_slope = distance * (-2 / temperature), -2 / temperature
            z = distance.square() * (-1 / temperature)
        self.z = z if absent is None else z.masked_fill_(absent.unsqueeze(-2), log_zero(z))

    @property
    def at_once(self) -> int:
        return len(self.z)

    def part(self, lists: slice) -> SoftSortLogits:
        return self

    def columns(self, matrix: Tensor) -> Tensor:
        return matrix.gather(-1, self._order.unsqueeze(-2).expand_as(matrix))

    def _back(self, tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor).scatter_(-1, self._order.expand_as(tensor), tensor)

    def pull(self, gradient: Tensor) -> Tensor:
        along = gradient * self._slope
        return self._back(along.sum(-1) - along.sum(-2))

    def combine(self, weights: Tensor) -> Tensor:
        result = weights * -self._slope.unsqueeze(1)
        result.diagonal(dim1=-2, dim2=-1).sub_(result.sum(-1))
        return result

    def rows(self, index: Tensor) -> Tensor:
        slope = self._slope.gather(-1, index)
        result = torch.diag_embed(slope.squeeze(-1))
        return result.scatter_add_(-1, index, -slope)

    def outer(self, index: Tensor, right: Tensor) -> Tensor:
        if _is_own_place(index):
            return torch.zeros_like(right)
        return self.rows(index).mT @ right

    def squares(self, weights: Tensor) -> Tensor:
        return _laplacian(weights * self._slope.square())

    def second_derivative(self, gradient: Tensor) -> Tensor | None:
        return _laplacian(self._slope_of_slope * gradient) if self._slope_of_slope else None

    def restore(self, hessian: Tensor) -> Tensor:
        return _unsorted(hessian, self._order)


def _sorted_order(scores: Tensor, absent: Tensor | None) -> Tensor:
    """Indices that sort the scores: ties in the order of the list, absent elements at the end."""
    key = scores if absent is None else scores.masked_fill(absent, torch.inf)
    return key.sort(dim=-1, stable=True).indices


def _is_own_place(index: Tensor) -> bool:
    """Whether each row's index, (N, n, 1), is the row's own place. On a device False: looking would wait for it."""
    return index.device.type == "cpu" and bool((index.squeeze(-1) == torch.arange(index.shape[1])).all())


def _unsorted(hessian: Tensor, order: Tensor) -> Tensor:
    """Rows and columns of a symmetric matrix back where they were before sorting."""
    index = order.unsqueeze(-2).expand_as(hessian)
    columns = torch.empty_like(hessian).scatter_(-1, index, hessian)
    return torch.empty_like(hessian).scatter_(-1, index, columns.mT)


def _laplacian(weights: Tensor) -> Tensor:
    """``sum_ik weights_ik (e_i - e_k)(e_i - e_k)'``."""
    both = weights + weights.mT
    return torch.diag_embed(both.sum(-1)) - both
