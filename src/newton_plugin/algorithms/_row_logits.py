"""Logits of a list as a function of its scores, linearised where they are: NeuralSort's and SoftSort's.

Both sorts are a row-softmax of logits z (row i = rank, column k = element) that are piecewise linear in the scores
(SoftSort with p = 2: quadratic). Between ties the Jacobian ``J_ik = dz_ik/ds``, a vector for each entry, has so much
structure that it is never formed:

* NeuralSort: ``J_ik = d_ik e_k + G_k`` with ``G_ka = sign(s_k - s_a)`` and ``d_ik = 2i - n - 1 - sum_a G_ka``;
* SoftSort, in sorted order: ``J_ik = -g_ik (e_i - e_k)`` with ``g_ik = sign(t_i - t_k)``; for p = 2, ``2 (t_i - t_k)``.

Everything over the temperature. At a tie the sign is 0, as autograd has it.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from newton_plugin.algorithms._log_domain import log_zero

__all__ = ["NeuralSortLogits", "RowLogits", "SoftSortLogits"]


class RowLogits(Protocol):
    """Logits with their first and second derivatives, of lists (N, n)."""

    z: Tensor
    """(N, n, n)"""

    def columns(self, matrix: Tensor) -> Tensor:
        """(N, n, n) with elements as columns, in the order of the columns of z."""
        ...

    def pull(self, gradient: Tensor) -> Tensor:
        """``sum_ik gradient_ik J_ik``: (N, n, n) -> (N, n), for rows that sum to 0."""
        ...

    def combine(self, weights: Tensor) -> Tensor:
        """``sum_k weights_ik J_ik`` for each row: (N, r, n, n) -> (N, r, n, n)."""
        ...

    def rows(self, index: Tensor) -> Tensor:
        """``J_ik`` with one k for each row i: (N, n, 1) -> (N, n, n)."""
        ...

    def squares(self, weights: Tensor) -> Tensor:
        """``sum_ik weights_ik J_ik J_ik'``: (N, n, n) -> (N, n, n)."""
        ...

    def bend(self, gradient: Tensor) -> Tensor | None:
        """``sum_ik gradient_ik d2 z_ik / ds2``; None where z is piecewise linear."""
        ...

    def restore(self, hessian: Tensor) -> Tensor:
        """(N, n, n) back to the order of the scores."""
        ...


class NeuralSortLogits:
    """See the module.

    Args:
        scores: (N, n), in the precision to work in.
        temperature: of the method.
        lengths: (N,), the first so many elements of each list are real.
    """

    def __init__(self, scores: Tensor, temperature: float, lengths: Tensor | None = None) -> None:
        self._temperature = temperature
        s = scores / temperature
        n = s.shape[-1]
        place = torch.arange(1 - n, n, 2, device=s.device, dtype=s.dtype).unsqueeze(-1)
        sign = s.unsqueeze(-1) - s.unsqueeze(-2)
        distance = sign.abs()
        sign.sign_()
        if lengths is None:
            self._place, self._sign = place, sign
            self.z = torch.addcmul(-distance.sum(-1).unsqueeze(-2), place, s.unsqueeze(-2))
        else:
            present = torch.arange(n, device=s.device) < lengths.unsqueeze(-1)
            self._place = place + (n - lengths)[:, None, None]
            self._sign = sign * present.unsqueeze(-2)
            distance = (distance * present.unsqueeze(-2)).sum(-1).unsqueeze(-2)
            z = self._place * s.unsqueeze(-2) - distance
            self.z = z.masked_fill_(~present.unsqueeze(-2), log_zero(z))
        self._own = self._place - self._sign.sum(-1).unsqueeze(-2)

    def columns(self, matrix: Tensor) -> Tensor:
        return matrix

    def pull(self, gradient: Tensor) -> Tensor:
        spread = (gradient.sum(-2).unsqueeze(-2) @ self._sign).squeeze(-2)
        return ((gradient * self._own).sum(-2) + spread) / self._temperature

    def combine(self, weights: Tensor) -> Tensor:
        spread = (weights.flatten(1, 2) @ self._sign).view(weights.shape)
        return spread.addcmul_(weights, self._own.unsqueeze(1)).div_(self._temperature)

    def rows(self, index: Tensor) -> Tensor:
        rows = self._sign.gather(-2, index.expand_as(self._sign))
        return rows.scatter_add_(-1, index, self._own.gather(-1, index)).div_(self._temperature)

    def squares(self, weights: Tensor) -> Tensor:
        linear = weights * self._own
        half = 0.5 * weights.sum(-2).unsqueeze(-1) * self._sign
        half.diagonal(dim1=-2, dim2=-1).add_(linear.sum(-2))
        half = self._sign.mT @ half
        result = half + half.mT
        result.diagonal(dim1=-2, dim2=-1).add_((linear * self._own).sum(-2))
        return result.div_(self._temperature**2)

    def bend(self, gradient: Tensor) -> Tensor | None:
        return None

    def restore(self, hessian: Tensor) -> Tensor:
        return hessian


class SoftSortLogits:
    """See the module; the columns of z are in sorted order.

    Args:
        scores, temperature, lengths: as above.
        p: the power of the distance, 1 or 2.
    """

    def __init__(self, scores: Tensor, temperature: float, p: int, lengths: Tensor | None = None) -> None:
        n = scores.shape[-1]
        absent = None if lengths is None else torch.arange(n, device=scores.device) >= lengths.unsqueeze(-1)
        key = scores if absent is None else scores.masked_fill(absent, torch.inf)
        self._order = key.sort(dim=-1, stable=True).indices
        t = scores.gather(-1, self._order)
        distance = t.unsqueeze(-1) - t.unsqueeze(-2)
        if p == 1:
            self._slope, self._curvature = distance.sign() / -temperature, 0.0  # dz_ik / dt_i
            z = distance * self._slope
        else:
            self._slope, self._curvature = distance * (-2 / temperature), -2 / temperature
            z = distance.square() * (-1 / temperature)
        self.z = z if absent is None else z.masked_fill_(absent.unsqueeze(-2), log_zero(z))

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

    def squares(self, weights: Tensor) -> Tensor:
        return _laplacian(weights * self._slope.square())

    def bend(self, gradient: Tensor) -> Tensor | None:
        return _laplacian(self._curvature * gradient) if self._curvature else None

    def restore(self, hessian: Tensor) -> Tensor:
        index = self._order.unsqueeze(-2)
        rows = torch.empty_like(hessian).scatter_(-1, index.expand_as(hessian), hessian)
        return torch.empty_like(hessian).scatter_(-2, index.mT.expand_as(hessian), rows)


def _laplacian(weights: Tensor) -> Tensor:
    """``sum_ik weights_ik (e_i - e_k)(e_i - e_k)'``."""
    both = weights + weights.mT
    return torch.diag_embed(both.sum(-1)) - both
