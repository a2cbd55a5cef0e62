"""x"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from newton_plugin._linalg.damped_inverse import (
    shifted_eigenvalues,
    spectral_inverse,
)
from newton_plugin._linalg.diagonal_low_rank import _DENSE_FEATURES
from newton_plugin._linalg.krylov import KrylovOptions, lockstep_power

__all__ = ["DiagonalRankOne"]


@dataclass(frozen=True)
class DiagonalRankOne:
    """``H_i = diag(d_i) - a_i p_i p_i'``.

    Attributes:
        diagonal: d, (N, m) or expandable to it.
        weight: a, (N,); None if there is no second term.
        vector: p, (N, m); None if there is no second term.
    """

    diagonal: Tensor
    weight: Tensor | None = None
    vector: Tensor | None = None

    def __call__(self, vectors: Tensor) -> Tensor:
        """Products, (K, N, m) -> (K, N, m)."""
        product = self.diagonal * vectors
        if self.weight is None or self.vector is None:
            return product
        inner = (self.vector * vectors).sum(-1, keepdim=True)
        return product - self.weight.unsqueeze(-1) * self.vector * inner


_DENSE_ELEMENTS = 2**25  # 256 MiB


_CACHE_ELEMENTS = 2**15  # 256 KiB


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
