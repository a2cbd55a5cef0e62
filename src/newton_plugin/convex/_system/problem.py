r"""A batch of quadratic programs in the one form that solvers see.

    min 1/2 x'Qx + p'x    subject to    C x = c in the first m rows,    C x <= c in the others

C stacks the user's A and G, c stacks b and h. Vectors always carry the batch dimension. Matrices carry it only where
they differ between problems: Q (n, n) is *shared*, Q (B, n, n) is not. A single problem is a batch of one with shared
matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LEAST_TOLERANCE", "MOST_TOLERANCE", "Problem", "condition", "finite", "own", "zero_tolerance"]


LEAST_TOLERANCE, MOST_TOLERANCE = 1e-11, 1e-7  # of ``zero_tolerance``, for conditions of Q of 1e4 and of 1e8


class Problem(NamedTuple):
    """B problems of n variables, m equalities and K rows altogether, in float64."""

    Q: Tensor
    """(n, n) or (B, n, n), symmetric."""
    p: Tensor
    """(B, n)."""
    C: Tensor
    """(K, n) or (B, K, n)."""
    c: Tensor
    """(B, K)."""
    m: int
    """The first m rows are equalities."""

    @property
    def batch(self) -> int:
        """B."""
        return self.p.shape[0]

    @property
    def is_equality(self) -> Tensor:
        """(K,), true for the first m rows."""
        return torch.arange(self.c.shape[-1], device=self.c.device) < self.m

    def at(self, index: Tensor) -> Problem:
        """The problems of these batch indices; shared matrices stay shared."""
        return Problem(own(self.Q, index), self.p[index], own(self.C, index), self.c[index], self.m)


def own(matrix: Tensor, index: Tensor) -> Tensor:
    """The matrices of these batch indices; a shared matrix stays shared."""
    return matrix if matrix.ndim == 2 else matrix[index]


def finite(problem: Problem) -> Tensor:
    """(B,): no NaN and no infinity in the data."""
    ok = torch.isfinite(problem.p).all(-1) & torch.isfinite(problem.c).all(-1)
    return ok & torch.isfinite(problem.Q).all(-1).all(-1) & torch.isfinite(problem.C).all(-1).all(-1)


def zero_tolerance(cholesky: Tensor, batch: int, least: float = LEAST_TOLERANCE) -> Tensor:
    """(B, 1): what counts as zero, relative to the terms of a slack or a multiplier; from L of Q = L L'.

    The tolerance grows with the condition of Q, as rounding does: the condition in units in which Q has a diagonal of
    ones (``units.py``).
    """
    pivots = cholesky.diagonal(dim1=-2, dim2=-1) / torch.linalg.vector_norm(cholesky, dim=-1)
    condition = (pivots.amax(-1) / pivots.amin(-1)) ** 2
    value = (4 * torch.finfo(cholesky.dtype).eps * condition).clamp(least, MOST_TOLERANCE)
    return value.expand(batch).unsqueeze(-1)


def condition(cholesky: Tensor) -> Tensor:
    """A lower estimate of the condition of ``L L'``, (max diag / min diag)^2: (n, n) -> (), (B, n, n) -> (B,)."""
    diagonal = cholesky.diagonal(dim1=-2, dim2=-1)
    return (diagonal.amax(-1) / diagonal.amin(-1)) ** 2
