r"""The curvature matrix C, stored as cheaply as it can be: one class for each kind of symmetric matrix.

==========================  =============================  ===================================
class                       C                              memory, and work of one inverse
==========================  =============================  ===================================
:class:`Isotropic`          ``c I``                        O(1)
:class:`Diagonal`           ``diag(c)``                    O(m)
:class:`Dense`              C, or one for each block       O(m^2), O(m^3)
==========================  =============================  ===================================

Where N < m or m is large there are also :class:`newton_plugin._linalg.diagonal_low_rank.DiagonalLowRank` and
:class:`newton_plugin._linalg.sketch.Sketch`. All of them answer the four questions of :class:`SymmetricMatrix`. All are
dataclasses of tensors, so that C can be used for several steps and put into a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from newton_plugin._linalg.damped_inverse import (
    Inverse,
    definite_inverse,
    finite_or_identity,
    repaired_inverse,
    shifted_eigenvalues,
    spectral_inverse,
)

__all__ = ["Dense", "Diagonal", "Isotropic", "SymmetricMatrix", "count_eigenvalues", "to_blocks", "to_rows"]


class SymmetricMatrix(Protocol):
    """C, however it is stored."""

    @property
    def matrix(self) -> Tensor | None:
        """C for people: see :class:`newton_plugin.CurvatureStep`. None where it was never formed."""
        ...

    def scale(self) -> Tensor:
        """Root-mean-square eigenvalue, which the damping is relative to; no dimensions."""
        ...

    def inverse(self, damping: Tensor, power: float) -> Inverse:
        """``(C + d I)^-power``, rows (N, m) to rows; repaired where ``C + d I`` is not positive definite."""
        ...

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest eigenvalue."""
        ...


@dataclass(frozen=True)
class Isotropic:
    """``C = c I``; c has no dimensions."""

    value: Tensor

    @property
    def matrix(self) -> Tensor:
        return self.value

    def scale(self) -> Tensor:
        return self.value.abs()

    def inverse(self, damping: Tensor, power: float) -> Inverse:
        factor = shifted_eigenvalues(self.value.unsqueeze(0), damping).pow(-power)
        return lambda g: g * factor

    def extremes(self) -> tuple[Tensor, Tensor]:
        return self.value, self.value


@dataclass(frozen=True)
class Diagonal:
    """``C = diag(c)``.

    Attributes:
        values: c, (m,).
        definite: whether all values are known not to be negative. The inverse then looks for no negative ones.
    """

    values: Tensor
    definite: bool = False

    @property
    def matrix(self) -> Tensor:
        return self.values

    def scale(self) -> Tensor:
        return torch.linalg.vector_norm(self.values) / count_eigenvalues(self.values) ** 0.5

    def inverse(self, damping: Tensor, power: float) -> Inverse:
        shifted = self.values + damping if self.definite else shifted_eigenvalues(self.values, damping)
        factor = shifted.pow(-power)
        return lambda g: g * factor

    def extremes(self) -> tuple[Tensor, Tensor]:
        return self.values.min(), self.values.max()


@dataclass(frozen=True)
class Dense:
    """C as it is.

    Attributes:
        matrix: (m, m); or (T, m, m), the blocks of a block-diagonal C whose rows come as in :func:`to_blocks`.
        definite: whether C is known to be positive semi-definite. The inverse then never waits for the device.
    """

    matrix: Tensor
    definite: bool = False

    def scale(self) -> Tensor:
        return torch.linalg.vector_norm(self.matrix) / count_eigenvalues(self.matrix) ** 0.5

    def inverse(self, damping: Tensor, power: float) -> Inverse:
        if power != 1:
            solve = spectral_inverse(self.matrix, damping, power)
        else:
            solve = (definite_inverse if self.definite else repaired_inverse)(self.matrix, damping)
        if self.matrix.ndim == 2:
            return solve
        blocks = self.matrix.shape[0]
        return lambda g: to_rows(solve(to_blocks(g, blocks)))

    def extremes(self) -> tuple[Tensor, Tensor]:
        values = torch.linalg.eigvalsh(finite_or_identity(self.matrix))
        return values.min(), values.max()


def count_eigenvalues(c: Tensor) -> int:
    """How many eigenvalues C has: of one number, the diagonal (m,), the matrix (m, m) or its blocks (T, m, m)."""
    return c.numel() // c.shape[-1] if c.ndim > 1 else max(1, c.numel())


def to_blocks(rows: Tensor, blocks: int) -> Tensor:
    """Rows (N T, m), sample by sample, to (T, N, m): the rows that share a block of C."""
    return rows.reshape(rows.shape[0] // blocks, blocks, rows.shape[-1]).transpose(0, 1)


def to_rows(blocks: Tensor) -> Tensor:
    """(T, N, m) -> (N T, m), the inverse of :func:`to_blocks`."""
    return blocks.transpose(0, 1).flatten(0, 1)
