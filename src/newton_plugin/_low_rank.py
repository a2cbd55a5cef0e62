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

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from newton_plugin._krylov import KrylovOptions, lockstep_power
from newton_plugin._sample_hessians import DiagonalRankOne
from newton_plugin._sketch import Sketch, probes_for, sketch
from newton_plugin._solve import Inverse, finite_or_identity, identity_rows, shifted_eigenvalues, spectral_inverse

__all__ = ["DiagonalLowRank", "dense_samples", "rank_one", "sample_diagonals", "sample_squares", "solve_samples"]

_DENSE_FEATURES = 1024  # up to here a repair may form its matrix
_DENSE_ELEMENTS = 2**25  # 256 MiB
_CACHE_ELEMENTS = 2**15  # 256 KiB


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


def rank_one(form: DiagonalRankOne) -> tuple[Tensor, Tensor]:
    """a (N,) and p (N, m)."""
    if form.weight is None or form.vector is None:
        return form.diagonal.new_zeros(len(form.diagonal)), torch.zeros_like(form.diagonal)
    return form.weight, form.vector


def dense_samples(form: DiagonalRankOne, n: int, m: int) -> Tensor:
    """All H_i, (N, m, m)."""
    matrices = torch.diag_embed(form.diagonal.expand(n, m))
    if form.weight is None or form.vector is None:
        return matrices
    return matrices - (form.weight.unsqueeze(-1) * form.vector).unsqueeze(-1) * form.vector.unsqueeze(-2)


def sample_diagonals(form: DiagonalRankOne, n: int, m: int) -> Tensor:
    """The diagonals of all H_i, (N, m)."""
    diagonal = form.diagonal.expand(n, m)
    if form.weight is None or form.vector is None:
        return diagonal
    return diagonal - form.weight.unsqueeze(-1) * form.vector.square()


def sample_squares(form: DiagonalRankOne, n: int, m: int) -> Tensor:
    """``||H_i||_F^2``, (N,): the diagonal's squares, and what ``(a p p')^2`` has beside its own diagonal."""
    return torch.cat([_squares(part) for part, _ in _chunks(form, form.diagonal.expand(n, m))])


def _squares(form: DiagonalRankOne) -> Tensor:
    if form.weight is None or form.vector is None:
        return torch.linalg.vecdot(form.diagonal, form.diagonal)
    own = form.vector.square()
    diagonal = form.diagonal - form.weight.unsqueeze(-1) * own
    beside = (own.sum(-1).square() - torch.linalg.vecdot(own, own)).clamp_min(0)
    return torch.linalg.vecdot(diagonal, diagonal) + form.weight.square() * beside


def solve_samples(form: DiagonalRankOne, damping: Tensor, gradient: Tensor, power: float) -> Tensor:
    """``(H_i + d I)^-power g_i`` for every sample; (N, m) to (N, m)."""
    return torch.cat([_solve(part, damping, rows, power) for part, rows in _chunks(form, gradient)])


def _chunks(form: DiagonalRankOne, gradient: Tensor) -> Iterator[tuple[DiagonalRankOne, Tensor]]:
    """A few samples at a time on a CPU, so that what is made on the way stays in its cache: three times as fast."""
    n, m = gradient.shape
    diagonal = form.diagonal.expand(n, m)
    size = max(1, _CACHE_ELEMENTS // max(1, m)) if gradient.device.type == "cpu" else max(1, n)
    for first in range(0, max(1, n), size):
        at = slice(first, first + size)
        weight = None if form.weight is None else form.weight[at]
        vector = None if form.vector is None else form.vector[at]
        yield DiagonalRankOne(diagonal[at], weight, vector), gradient[at]


def _solve(form: DiagonalRankOne, damping: Tensor, gradient: Tensor, power: float) -> Tensor:
    if form.weight is None or form.vector is None:
        return gradient * shifted_eigenvalues(form.diagonal, damping).pow(-power)
    if power != 1:
        return _repaired(form, damping, gradient, power)
    shifted = form.diagonal + damping
    scaled = form.vector / shifted
    left = 1 - form.weight * torch.linalg.vecdot(scaled, form.vector)
    solved = gradient / shifted
    inner = form.weight * torch.linalg.vecdot(solved, form.vector) / left
    solved.addcmul_(inner.unsqueeze(-1), scaled)
    failed = (left <= 0) | (shifted.amin(-1) <= 0)
    if bool(failed.any()):  # waits for the device, as every repair does
        part = DiagonalRankOne(form.diagonal[failed], form.weight[failed], form.vector[failed])
        solved[failed] = _repaired(part, damping, gradient[failed], power)
    return solved


def _repaired(form: DiagonalRankOne, damping: Tensor, gradient: Tensor, power: float) -> Tensor:
    n, m = gradient.shape
    if m <= _DENSE_FEATURES and n * m * m <= _DENSE_ELEMENTS:
        matrices = dense_samples(form, n, m)
        finite = torch.isfinite(matrices).all(-1, keepdim=True).all(-2, keepdim=True)
        solved = spectral_inverse(torch.where(finite, matrices, 0.0), damping, power)(gradient)
        return torch.where(finite.squeeze(-1), solved, torch.nan)
    options = KrylovOptions(tolerance=1e-10, most=64)
    return lockstep_power(lambda v: form(v.unsqueeze(0))[0], gradient, damping, power, options).step
