r"""A diagonal plus a matrix of low rank: the mean Hessian of cross-entropy, inverted without an m x m matrix.

The mean over N samples of ``diag(d_i) - a_i p_i p_i'`` is ``C = diag(mean d) - P' W P``, the rows of P being p_i and
W = diag(a_i / N). Where N < m the formula of Woodbury is cheap. With E = mean d + damping and R = W^1/2 P, which is
never formed:

    (diag(E) - R' R)^-1 = E^-1 + E^-1 R' (I - R E^-1 R')^-1 R E^-1,

an N x N system, positive definite exactly where C + d I is. What is not positive definite is repaired by the
absolute values of its eigenvalues, as everywhere: of the dense matrix where it is small, of a sketch elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from newton_plugin._linalg.damped_inverse import Inverse, finite_or_identity, identity_rows, spectral_inverse
from newton_plugin._linalg.diagonal_rank_one import REPAIR_FEATURES
from newton_plugin._linalg.sketch import Sketch, probes_for, sketch
from newton_plugin._runtime.transforms import readable

__all__ = ["DiagonalLowRank"]


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
        # ||C||_F^2 from N x N numbers. Where the two terms of C cancel up to rounding, this is rounding as well.
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
        system = system + identity_rows(system)
        factor, info = torch.linalg.cholesky_ex(system)
        definite = (info == 0) & (shifted > 0).all()
        if not readable(definite):
            factor = factor.masked_fill(~definite, torch.nan)  # and the step is not taken
        elif not bool(definite):  # waits for the device, as every repair does
            if not bool(torch.isfinite(system).all() & torch.isfinite(self.diagonal).all()):
                return lambda g: torch.full_like(g, torch.nan)
            return self._spectral(damping, 1.0)

        def solve(g: Tensor) -> Tensor:
            solved = g / shifted
            inner = torch.cholesky_solve((solved @ self.rows.mT * self.roots).mT, factor).mT
            inner = inner * (self.roots * -self.factor)
            # In place it has no rule for vmap, which would take one member after the other.
            return solved.addmm_(inner, scaled) if readable(solved) else torch.addmm(solved, inner, scaled)

        return solve

    def _between(self, gram: Tensor) -> Tensor:
        """``diag(r) A diag(r)`` for A (N, N)."""
        return self.roots.unsqueeze(-1) * gram * self.roots

    def _times(self, vectors: Tensor) -> Tensor:
        """``v C``, rows to rows."""
        return vectors * self.diagonal + (vectors @ self.rows.mT * (self.factor * self.roots.square())) @ self.rows

    def _dense(self) -> Tensor:
        return self._times(identity_rows(self.rows))

    def _spectral(self, damping: Tensor, power: float) -> Inverse:
        """Through the eigenvalues of C where it is small, of its sketch where it is large."""
        if self.diagonal.shape[0] <= REPAIR_FEATURES:
            return spectral_inverse(self._dense(), damping, power)
        return self._sketch().inverse(damping, power)

    def _sketch(self) -> Sketch:
        probes = probes_for(self.rows)
        return sketch(probes, self._times(probes))

    def extremes(self) -> tuple[Tensor, Tensor]:
        if self.diagonal.shape[0] > REPAIR_FEATURES:
            return self._sketch().extremes()
        values = torch.linalg.eigvalsh(finite_or_identity(self._dense()))
        return values.min(), values.max()
