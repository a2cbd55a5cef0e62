r"""Units: what a problem says about the size of its variables and rows, so that no threshold depends on them.

A variable may count in euros or in millions of euros, and a row may be multiplied by any number. Solvers of QPs
therefore scale rows and columns first (Ruiz; OSQP, Clarabel). For x = D u that is the problem

    D Q D,   D p,   E C D,   E c      D, E diagonal

The method for definite Q consists of Cholesky factors, triangular solves and residuals. These give the same bits in
all units that are powers of two, so scaling the data would change nothing there. What depends on units is each
*comparison*: which row is violated most, which multiplier counts as zero. So the data stay as they are, and the
comparisons take the unit ``d_j = 1 / sqrt(Q_jj)`` of each variable into account, in which Q has a diagonal of ones:
a row has the length |C_r D|, x the size |D^-1 x|, the gradient the size |D p|.

Where Q is singular, its diagonal need not say anything about units, and the proximal-point method is not invariant.
There the data are scaled, by powers of two (:func:`equilibrate`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin.convex._system.problem import Problem
from newton_plugin.convex._system.products import times

__all__ = ["equilibrate", "row_lengths", "size_in", "unit_of"]

_ROUNDS = 10  # of Ruiz' iteration
_SPREAD = 64.0  # columns whose scales differ by less stay as they are
_UNBOUNDED = 1e200  # beyond: no bound


def unit_of(cholesky: Tensor) -> Tensor:
    """1 / sqrt(Q_jj) from L of Q = L L': (n, n) -> (n,), (B, n, n) -> (B, n)."""
    return 1.0 / torch.linalg.vector_norm(cholesky, dim=-1)


def row_lengths(C: Tensor, unit: Tensor) -> Tensor:
    """The lengths of the rows in these units: C (K, n) or (B, K, n), unit (n,) or (B, n) -> (K,) or (B, K)."""
    if C.ndim == 2 and unit.ndim == 2:
        return times(C.square(), unit.square()).sqrt()
    return torch.linalg.vector_norm(C * unit.unsqueeze(-2), dim=-1)


def size_in(unit: Tensor, x: Tensor) -> Tensor:
    """|D^-1 x|: unit (n,) or (B, n), x (B, n) -> (B, 1)."""
    return torch.linalg.vector_norm(x / unit, dim=-1, keepdim=True)


def equilibrate(problem: Problem) -> tuple[Problem, Tensor, Tensor]:
    """The problem in other units, and these: D (B, n), E (B, K), powers of two; x = D u, y = E w.

    Each row of [Q, C'; C, 0] gets a largest entry near one (Ruiz, "A scaling algorithm to equilibrate both rows and
    columns norms in matrices", 2001). Q and C have to be (B, n, n) and (B, K, n).
    """
    Q, C = problem.Q.abs(), problem.C.abs()
    columns, rows = torch.ones_like(problem.p), torch.ones_like(problem.c)
    for _ in range(_ROUNDS):
        scaled = C * columns.unsqueeze(-2) * rows.unsqueeze(-1)
        objective = Q * columns.unsqueeze(-2) * columns.unsqueeze(-1)
        largest = objective.amax(-1)
        if scaled.shape[-2]:
            largest = torch.maximum(largest, scaled.amax(-2))
            rows = rows / _root(scaled.amax(-1))
        columns = columns / _root(largest)
    plain = columns.amax(-1) <= _SPREAD * columns.amin(-1)
    columns, rows = (
        torch.where(plain.unsqueeze(-1), 1.0, torch.exp2(torch.log2(scale).round())) for scale in (columns, rows)
    )
    scaled = problem._replace(
        Q=problem.Q * columns.unsqueeze(-2) * columns.unsqueeze(-1),
        p=problem.p * columns,
        C=problem.C * columns.unsqueeze(-2) * rows.unsqueeze(-1),
        c=torch.where(problem.c.abs() < _UNBOUNDED, problem.c * rows, problem.c),
    )
    return scaled, columns, rows


def _root(largest: Tensor) -> Tensor:
    return torch.where(largest > 0, largest, 1.0).sqrt()
