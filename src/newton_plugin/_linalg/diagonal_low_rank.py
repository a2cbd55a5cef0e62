r"""Diagonal plus low rank: the curvature of cross-entropy, inverted without an m x m matrix.

One sample's Hessian ``H = diag(D) - a p p'`` is inverted in O(m) by the formula of Sherman and Morrison, with
E = D + d:

    (diag(E) - a p p')^-1 g = E^-1 g + E^-1 p (a p' E^-1 g) / (1 - a p' E^-1 p).

If all E > 0, the matrix is positive definite exactly where the denominator is positive. The mean over N samples is
``C = diag(mean D) - P' W P``, the rows of P being p_i and W = diag(a_i / N), and N < m makes the formula of Woodbury
cheap. With R = W^1/2 P, which is never formed:

    (diag(E) - R' R)^-1 = E^-1 + E^-1 R' (I - R E^-1 R')^-1 R E^-1,

an N x N system, positive definite exactly where C + d I is. What is not positive definite is repaired by the
absolute values of its eigenvalues, as everywhere: densely where the matrices are small, in Krylov spaces or from a
sketch elsewhere. No loss of PyTorch with non-negative class weights gets there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from newton_plugin._linalg.damped_inverse import (
    Inverse,
    finite_or_identity,
    identity_rows,
    spectral_inverse,
)
from newton_plugin._linalg.sketch import Sketch, probes_for, sketch

__all__ = [
    "DiagonalLowRank",
]

_DENSE_FEATURES = 1024  # up to here a repair may form its matrix


@dataclass(frozen=True)
class DiagonalLowRank:
    """``C = diag(D) + factor P' diag(r)^2 P``.

    Attributes:
        diagonal: D, (m,).
        rows: P, (N, m).
        roots: r, (N,): the square roots of the weights of the rows.
        factor: of any sign; no dimensions.
    """

    diagonal: Tensor
    rows: Tensor
    roots: Tensor
    factor: Tensor

    matrix = None

    def scale(self) -> Tensor:
        # ||C||_F^2 from N x N. Where C is rounding beside its two terms, so is the difference of these.
        gram = self._between(self.rows @ self.rows.mT)
        mixed = (self.rows.square() @ self.diagonal) @ self.roots.square()
        squared = self.diagonal.square().sum() + 2 * self.factor * mixed + self.factor.square() * gram.square().sum()
        return (squared.clamp_min(0) / self.diagonal.shape[0]).sqrt()

    def inverse(self, damping: Tensor, power: float) -> Inverse:
        if power != 1:
            return self._spectral(damping, power)
        shifted = self.diagonal + damping
        scaled = self.rows / shifted  # P E^-1
        system = self.factor * self._between(scaled @ self.rows.mT)
        system.diagonal().add_(1)
        factor, info = torch.linalg.cholesky_ex(system)
        if not bool((info == 0) & (shifted > 0).all()):  # waits for the device, as every repair does
            if not bool(torch.isfinite(system).all() & torch.isfinite(self.diagonal).all()):
                return lambda g: torch.full_like(g, torch.nan)
            return self._spectral(damping, 1.0)

        def solve(g: Tensor) -> Tensor:
            solved = g / shifted
            inner = torch.cholesky_solve((solved @ self.rows.mT * self.roots).mT, factor).mT
            return solved.addmm_(inner * (self.roots * -self.factor), scaled)

        return solve

    def _between(self, gram: Tensor) -> Tensor:
        return self.roots.unsqueeze(-1) * gram * self.roots

    def _times(self, vectors: Tensor) -> Tensor:
        """``v C``, rows to rows."""
        return vectors * self.diagonal + (vectors @ self.rows.mT * (self.factor * self.roots.square())) @ self.rows

    def _dense(self) -> Tensor:
        return self._times(identity_rows(self.rows))

    def _spectral(self, damping: Tensor, power: float) -> Inverse:
        """Through the eigenvalues of C where it is small, of its sketch where it is large."""
        if self.diagonal.shape[0] <= _DENSE_FEATURES:
            return spectral_inverse(self._dense(), damping, power)
        return self._sketch().inverse(damping, power)

    def _sketch(self) -> Sketch:
        probes = probes_for(self.rows)
        return sketch(probes, self._times(probes))

    def extremes(self) -> tuple[Tensor, Tensor]:
        if self.diagonal.shape[0] > _DENSE_FEATURES:
            return self._sketch().extremes()
        values = torch.linalg.eigvalsh(finite_or_identity(self._dense()))
        return values.min(), values.max()
