r"""The solution at given rows, and whether it is one: each optimality condition, in the units of the data.

x solves the optimality system at the rows W (``_system/kkt.py``), so the gradient vanishes up to the rounding of a
Cholesky solve, ``|Qx + p + C'y|_j <= n eps |D^-1 x| / d_j``. What has to be checked is the rest:

    C_r x <= c_r,   and = in W        up to   t (|c_r| + sum_j |C_rj x_j|) + floor
    y_r >= 0                          up to   t max(|D p|, |y_s| |C_s D|) / |C_r D|

The first is a backward error row by row: x is exact for data that differ by t, relative to each entry. The floor is for
answers that are exactly zero, which no computation gives: ``1e-14 |C_r D| (|D^-1 x| + ...)``, the rounding of x.
D holds the units of the variables (``_system/units.py``).

An answer is *tight* with t = 1e-13. It is *loose*, and only good if nobody finds a better one, with t = 4 tolerance, at
most 1e-9.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from newton_plugin.convex._system.factors import Factors, factor_rows, inside, put
from newton_plugin.convex._system.kkt import kkt_apply
from newton_plugin.convex._system.problem import Problem
from newton_plugin.convex._system.products import cholesky_apply, times, times_transposed
from newton_plugin.convex._system.units import row_lengths, size_in, unit_of

__all__ = ["Scale", "State", "judge", "scale_of"]

_ROUNDING = 1e-14  # rows in force should hold to this, relative to the terms of the product
_TIGHT = 1e-13  # of the optimality conditions, relative to their terms
_LOOSE = 1e-9  # the most that is allowed, in whatever condition Q is
_MOST_STEPS = 3  # of refinement


class Scale(NamedTuple):
    """The sizes that B problems have by their data."""

    unit: Tensor
    """(n,) or (B, n), D."""
    length: Tensor
    """(K,) or (B, K), |C_r D|."""
    gradient: Tensor
    """(B, 1), |D p|."""
    tolerance: Tensor
    """(B, 1), as in ``zero_tolerance``."""
    start: Tensor
    """(B, 1), |L^-1 p|: how far the minimiser without constraints is from zero."""
    minimiser: Tensor
    """(B, n), -Q^-1 p."""
    precision: float
    """The rounding error of the caller's dtype: what the data are good for."""

    def at(self, index: Tensor) -> Scale:
        """The scales of these batch indices."""

        def own(t: Tensor) -> Tensor:
            return t if t.ndim == 1 else t[index]

        return Scale(*(own(t) for t in self[:6]), precision=self.precision)  # type: ignore[misc]


def scale_of(problem: Problem, cholesky: Tensor, tolerance: Tensor, precision: float) -> Scale:
    """The scales of B problems, Q = L L'."""
    unit = unit_of(cholesky)
    gradient = torch.linalg.vector_norm(unit * problem.p, dim=-1, keepdim=True)
    x0 = -cholesky_apply(cholesky, problem.p)
    start = torch.linalg.vector_norm(times_transposed(cholesky, x0), dim=-1, keepdim=True)  # |L'Q^-1 p| = |L^-1 p|
    return Scale(unit, row_lengths(problem.C, unit), gradient, tolerance, start, x0, precision)


class State(NamedTuple):
    """A solution at certain rows, what is wrong with it, and whether it is good enough."""

    x: Tensor
    y: Tensor
    wrong: Tensor
    """(B, K): rows outside that should be inside."""
    tight: Tensor
    loose: Tensor
    factors: Factors

    def at(self, index: Tensor) -> State:
        return State(*(t[index] for t in self[:5]), factors=self.factors.at(index))  # type: ignore[misc]

    def put(self, index: Tensor, part: State) -> State:
        fields = [old.index_copy(0, index, new) for old, new in zip(self[:5], part[:5], strict=True)]
        return State(*fields, factors=put(self.factors, index, part.factors))  # type: ignore[arg-type, misc]

    def where(self, mask: Tensor) -> State:
        """Good only where the mask is true."""
        return self._replace(tight=self.tight & mask, loose=self.loose & mask)


def judge(problem: Problem, factors: Factors, scale: Scale, adaptive: bool) -> State:
    """The solution at these rows, less the weakly active ones, and what is wrong with it."""
    x, y, slack, floor, factors = _refined_solution(problem, factors, scale, adaptive)
    weighted = (y * scale.length).gather(1, factors.rows) * factors.present
    gradient, free = scale.gradient, factors.rows < problem.m
    if weighted.shape[1]:
        forces = weighted
        if factors.inverse.shape[-1]:  # equalities that are nearly dependent pull against each other: their sum counts
            pull = times_transposed(problem.C[..., : problem.m, :], y[:, : problem.m]) * scale.unit
            gradient = torch.maximum(gradient, torch.linalg.vector_norm(pull, dim=-1, keepdim=True))
            forces = weighted.masked_fill(free, 0.0)
        gradient = torch.maximum(gradient, forces.abs().amax(-1, keepdim=True))
    negative = factors.present & ~free & (weighted < -_TIGHT * gradient)
    very_negative = factors.present & ~free & (weighted < -4 * scale.tolerance * gradient)
    weak = factors.present & ~free & (weighted <= 4 * scale.tolerance * gradient)
    if bool(weak.any()):
        index = weak.any(-1).nonzero().squeeze(-1)
        kept = factors._replace(present=factors.present & ~weak).at(index)
        rows = inside(kept, problem.c.shape[1])
        part = factor_rows(problem.at(index), kept.cholesky, rows, kept.refined, scale.precision)
        factors = put(factors, index, part)
        x, y, slack, floor, factors = _refined_solution(problem, factors, scale, adaptive)
    held = inside(factors, problem.c.shape[1])
    off = torch.where(held | problem.is_equality, slack.abs(), -slack) - floor
    terms = problem.c.abs()
    if bool((off > _TIGHT * terms).any()):
        terms = terms + times(problem.C.abs(), x.abs())
    finite_x = torch.isfinite(x).all(-1)
    # Rows that are dependent up to the rounding of the caller's dtype contradict each other by as much.
    rounding = 8 * scale.precision
    allowed = _TIGHT * terms
    if factors.inverse.shape[-1]:
        allowed = torch.where(factors.singular.unsqueeze(-1) & held, max(_TIGHT, rounding) * terms, allowed)
    most = torch.clamp(4 * scale.tolerance, max=_LOOSE).clamp(min=rounding)
    tight = (off <= allowed).all(-1) & ~negative.any(-1) & finite_x
    spread = 1e-3 * size_in(scale.unit, x) + 1e-4 * scale.start
    loose = (off <= most * (terms + scale.length * spread)).all(-1) & ~very_negative.any(-1) & finite_x
    return State(x, y, (off > allowed) & ~problem.is_equality, tight, loose, factors)


def _refined_solution(
    problem: Problem, factors: Factors, scale: Scale, adaptive: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Factors]:
    """x, y, slack, its rounding, and the factors with as many steps of refinement as were needed."""
    rx, ry = -problem.p.unsqueeze(-1), problem.c.unsqueeze(-1)
    if adaptive and factors.rows.shape[1]:
        # S = R R' has lost as many digits as its rows are dependent: pivot / diagonal is a squared sine.
        pivots = factors.schur.diagonal(dim1=-2, dim2=-1).square() / factors.schur.square().sum(-1)
        sine = pivots.amin(-1)
        steps = (sine < 1e-3).long() + (sine < 1e-6).long()
        factors = factors._replace(refined=torch.maximum(factors.refined, steps))
    while True:
        x, y = (u.squeeze(-1) for u in kkt_apply(problem.Q, problem.C, rx, ry, factors))
        slack = problem.c - times(problem.C, x)
        floor = _ROUNDING * scale.length * (size_in(scale.unit, x) + scale.tolerance * scale.start)
        missed = slack.abs() > _ROUNDING * problem.c.abs() + floor
        missed = missed.gather(1, factors.rows) & factors.present
        more = missed.any(-1) & (factors.refined < _MOST_STEPS)
        if not adaptive or not bool(more.any()):
            return x, y, slack, floor, factors
        factors = factors._replace(refined=factors.refined + more)
