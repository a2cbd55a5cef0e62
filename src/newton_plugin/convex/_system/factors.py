"""The factors of a batch of optimality systems: computed once by the solver, kept for every derivative."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from newton_plugin.convex._system.problem import Problem, own
from newton_plugin.convex._system.rows import compress, masked_cholesky, take_rows, whiten

_EPS = torch.finfo(torch.float64).eps
_DEPENDENT = 1e-12  # sine of the angle to the other rows, below which a row depends on them

__all__ = ["Factors", "factor_rows", "inside", "no_factors", "pseudo_inverse", "put", "stack"]


class Factors(NamedTuple):
    """A factored optimality system; B problems, K rows of constraints, f >= the largest number of working rows."""

    cholesky: Tensor
    """L of Q, (n, n) if shared or (B, n, n)."""
    rows: Tensor
    """(B, f) indices of the working rows, 0 where there is none."""
    present: Tensor
    """(B, f) whether there is one."""
    schur: Tensor
    """R of S, (B, f, f), the identity where there is no row."""
    inverse: Tensor
    """(B, n + f, n + f) pseudo-inverses of K, used where ``singular``; (B, 0, 0) if nowhere."""
    singular: Tensor
    """(B,) where the pseudo-inverse is used."""
    refined: Tensor
    """(B,) number of steps of iterative refinement that follow."""

    def at(self, index: Tensor) -> Factors:
        """The factors of these batch indices."""
        return Factors(own(self.cholesky, index), *(t[index] for t in self[1:]))


def no_factors(cholesky: Tensor, batch: int) -> Factors:
    """No working rows yet."""
    rows = torch.zeros(batch, 0, dtype=torch.long, device=cholesky.device)
    none = cholesky.new_zeros(batch, 0, 0)
    flags = torch.zeros(batch, dtype=torch.bool, device=cholesky.device)
    return Factors(cholesky, rows, rows.bool(), none, none, flags, flags.long())


def put(factors: Factors, index: Tensor, part: Factors) -> Factors:
    """Replace the factors of these batch indices. The factor of Q stays."""
    n = factors.cholesky.shape[-1]
    f = max(factors.rows.shape[1], part.rows.shape[1])
    size = n + f if factors.inverse.shape[1] or part.inverse.shape[1] else 0
    wide, new = _widen(factors, f, size), _widen(part, f, size)
    merged = []
    for old, value in zip(wide[1:], new[1:], strict=True):
        old = old.clone()
        old[index] = value
        merged.append(old)
    return Factors(factors.cholesky, *merged)


def stack(parts: list[Factors]) -> Factors:
    """The factors of consecutive parts of a batch, each with its own factor of Q (shared within the part)."""
    n = parts[0].cholesky.shape[-1]
    f = max(part.rows.shape[1] for part in parts)
    size = n + f if any(part.inverse.shape[1] for part in parts) else 0
    wide = [_widen(part, f, size) for part in parts]
    wide = [part._replace(cholesky=part.cholesky.expand(len(part.rows), n, n)) for part in wide]
    return Factors(*(torch.cat(values) for values in zip(*wide, strict=True)))


def _widen(factors: Factors, f: int, size: int) -> Factors:
    extra = f - factors.rows.shape[1]
    more = size - factors.inverse.shape[1]
    pad = torch.nn.functional.pad
    schur = pad(factors.schur, (0, extra, 0, extra))
    if extra:
        schur.diagonal(dim1=-2, dim2=-1)[:, -extra:] = 1.0
    return factors._replace(
        rows=pad(factors.rows, (0, extra)),
        present=pad(factors.present, (0, extra)),
        schur=schur,
        inverse=pad(factors.inverse, (0, more, 0, more)),
    )


def inside(factors: Factors, count: int) -> Tensor:
    """The working rows as a mask (B, K)."""
    mask = factors.present.new_zeros(factors.rows.shape[0], count + 1)
    return mask.scatter_(1, torch.where(factors.present, factors.rows, count), True)[:, :count]


def factor_rows(
    problem: Problem, cholesky: Tensor, active: Tensor, refined: Tensor, precision: float = _EPS
) -> Factors:
    """Factors for these active rows (B, K). Where the rows are (nearly) dependent, the pseudo-inverse is used.

    ``precision``: the rounding error of the data, by which dependent rows may differ from dependence.
    """
    count = active.shape[-1]
    if count <= 24:  # equal bits need a width that depends on the shape alone: see products.py
        index, present = torch.arange(count, device=active.device).expand_as(active), active
    else:
        index, present = compress(active, 24)
    rows = take_rows(problem.C, index) * present.unsqueeze(-1)
    V = whiten(cholesky, rows)
    schur, independent = masked_cholesky(V.mT @ V, present)
    factors = no_factors(cholesky, len(index))
    factors = factors._replace(rows=index, present=present, schur=schur, singular=~independent, refined=refined)
    if bool(independent.all()):
        return factors
    bad = (~independent).nonzero().squeeze(-1)
    schur[bad] = torch.eye(index.shape[1], dtype=V.dtype, device=V.device)
    size = V.shape[1] + index.shape[1]
    inverse = V.new_zeros(len(index), size, size)
    L = own(cholesky, bad).expand(len(bad), V.shape[1], V.shape[1])
    inverse[bad] = _inverse_at_dependent_rows(L, V[bad], precision)
    return factors._replace(schur=schur, inverse=inverse)


def _inverse_at_dependent_rows(L: Tensor, V: Tensor, precision: float) -> Tensor:
    r"""A pseudo-inverse of K where Q = L L' is definite and the rows are nearly or fully dependent.

    L (B, n, n), V = L^-1 C_W' (B, n, f) -> (B, n + f, n + f).

    S = V'V would square the angle between rows, and so does every solver of K. With V = U s Z'::

        K^-1 = [ L'^-1 (1 - U U') L^-1    L'^-1 U s^-1 Z' ]
               [ Z s^-1 U' L^-1           -Z s^-2 Z'      ]

    loses as many digits as the angle itself. Columns of V get the length one first, so that the rank does not depend
    on units. Rows count as dependent by the rounding of their entries.
    """
    length = torch.linalg.vector_norm(V, dim=-2, keepdim=True)
    length = torch.where(length > 0, length, 1.0)
    U, s, Zt = torch.linalg.svd(V / length, full_matrices=False)
    kept = s > max(_DEPENDENT, 8 * precision) * s.amax(-1, keepdim=True).clamp(min=1.0)
    inverse_s = torch.where(kept, 1.0 / torch.where(kept, s, 1.0), 0.0).unsqueeze(-1)
    U = U * kept.unsqueeze(-2)
    size = V.shape[-2]
    eye = torch.eye(size, dtype=V.dtype, device=V.device)
    L_inverse = torch.linalg.solve_triangular(L, eye.expand_as(L), upper=False)
    UL = U.mT @ L_inverse
    across = (Zt.mT @ (inverse_s * UL)) / length.mT
    multipliers = inverse_s * Zt / length
    top = torch.cat((L_inverse.mT @ L_inverse - UL.mT @ UL, across.mT), -1)
    return torch.cat((top, torch.cat((across, -multipliers.mT @ multipliers), -1)), -2)


def pseudo_inverse(Q: Tensor, C_rows: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Pseudo-inverse of K, and whether the minimiser is unique.

    Q (B, n, n), the working rows C_rows (B, f, n), present (B, f) -> (B, n + f, n + f), (B,).

    K is scaled first to rows of about unit size (D K D), so that its rank does not depend on units. The minimiser is
    unique where Q is definite on the null space of the rows. This is so where K, restricted to an independent set of
    rows, has no null vector with a part in x.
    """
    n, f = Q.shape[-1], C_rows.shape[-2]
    C_rows = C_rows * present.unsqueeze(-1)
    size = n + f
    K = Q.new_zeros(Q.shape[0], size, size)
    K[:, :n, :n] = 0.5 * (Q + Q.mT)
    K[:, n:, :n] = C_rows
    K[:, :n, n:] = C_rows.mT
    scale = torch.ones_like(K[:, 0])
    for _ in range(10):
        largest = (K * scale.unsqueeze(-1) * scale.unsqueeze(-2)).abs().amax(-1)
        scale = scale / torch.where(largest > 0, largest, 1.0).sqrt()
    K = K * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    values, vectors = torch.linalg.eigh(K)
    small = values.abs() <= 1e-12 * size * values.abs().amax(-1, keepdim=True)
    inverse = torch.where(small, 0.0, 1.0 / torch.where(small, 1.0, values))
    unique = ~((vectors[:, :n].abs().amax(1) > 1e-6) & small).any(-1)
    inverse = (vectors * inverse.unsqueeze(-2)) @ vectors.mT
    return inverse * scale.unsqueeze(-1) * scale.unsqueeze(-2), unique
