"""Strictly convex QPs: first the active rows, then the solution at these rows to the last digits.

Pivoting decides by quantities that carry the rounding of factorisations. Therefore the solution at its rows is refined
against Q and C, and checked again by *tight* tolerances. Rows on the wrong side then change places block by block
(active-set polishing), each time by refined quantities. What is still not optimal goes to the dual active-set method
and through the same polishing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from newton_plugin.convex._active_set.dual import dual_active_set
from newton_plugin.convex._active_set.pivoting import pivot
from newton_plugin.convex._status import Status
from newton_plugin.convex._system.factors import Factors, factor_rows, inside, no_factors, put
from newton_plugin.convex._system.kkt import kkt_apply
from newton_plugin.convex._system.problem import Problem, finite, zero_tolerance
from newton_plugin.convex._system.products import times

__all__ = ["Solved", "solve_definite"]

_ROUNDING = 1e-14  # rows in force should hold to this, relative to the terms of the product
_TIGHT = 1e-13  # of the optimality conditions, relative to their terms
_MOST_STEPS = 3  # of refinement
_POLISHING = 16  # rounds


class Solved(NamedTuple):
    """B solutions."""

    x: Tensor
    """(B, n)."""
    y: Tensor
    """(B, K), the multipliers of all rows."""
    status: Tensor
    """(B,)."""
    active: Tensor
    """(B, K), the rows in force."""
    unique: Tensor
    """(B,), whether there is no other minimiser."""
    factors: Factors


class _State(NamedTuple):
    """A solution at certain rows, what is wrong with it, and whether it is good enough."""

    x: Tensor
    y: Tensor
    wrong: Tensor
    """(B, K): rows outside that should be inside."""
    tight: Tensor
    loose: Tensor
    factors: Factors

    def at(self, index: Tensor) -> _State:
        return _State(
            self.x[index],
            self.y[index],
            self.wrong[index],
            self.tight[index],
            self.loose[index],
            self.factors.at(index),
        )

    def put(self, index: Tensor, part: _State) -> _State:
        def replaced(old: Tensor, new: Tensor) -> Tensor:
            return old.index_copy(0, index, new)

        return _State(
            replaced(self.x, part.x),
            replaced(self.y, part.y),
            replaced(self.wrong, part.wrong),
            replaced(self.tight, part.tight),
            replaced(self.loose, part.loose),
            put(self.factors, index, part.factors),
        )

    def where(self, mask: Tensor) -> _State:
        """Good only where the mask is true."""
        return self._replace(tight=self.tight & mask, loose=self.loose & mask)


def solve_definite(problem: Problem, cholesky: Tensor, refined: Tensor, claim: Tensor | None, adaptive: bool) -> Solved:
    """Solve B problems with Q = L L'.

    ``refined`` (B,): steps of refinement to begin with; ``adaptive``: more where residuals ask for it;
    ``claim``: active rows (B, K) that another solver found.
    """
    tolerance = zero_tolerance(cholesky, problem.batch)
    if claim is None:
        pivoted = pivot(problem, cholesky, tolerance)
        factors = no_factors(cholesky, problem.batch)._replace(
            rows=pivoted.rows, present=pivoted.present, schur=pivoted.schur, refined=refined
        )
        state = _judge(problem, factors, tolerance, adaptive).where(pivoted.found)
    else:
        factors = factor_rows(problem, cholesky, claim | problem.is_equality, refined)
        state = _judge(problem, factors, tolerance, adaptive)
    status = torch.zeros_like(refined)
    if not bool(state.tight.all()):
        # Loose answers are polished first. What is still not tight after that is solved again.
        state = _polish_some(problem, state, state.loose & ~state.tight, tolerance)
        left = (~state.tight).nonzero().squeeze(-1)
        if len(left):
            state, status = _solve_again(problem, left, state, tolerance)
    rows = inside(state.factors, problem.c.shape[1])
    return Solved(state.x, state.y, status, rows, torch.ones_like(state.tight), state.factors)


def _judge(problem: Problem, factors: Factors, tolerance: Tensor, adaptive: bool) -> _State:
    """The solution at these rows, less the weakly active ones, and what is wrong with it."""
    length = torch.linalg.vector_norm(problem.C, dim=-1)
    x, y, slack, terms, factors = _refined_solution(problem, factors, length, adaptive)
    weighted = (y * length).gather(1, factors.rows) * factors.present
    scale = torch.linalg.vector_norm(problem.p, dim=-1, keepdim=True)
    if weighted.shape[1]:
        scale = torch.maximum(scale, weighted.abs().amax(-1, keepdim=True))
    free = factors.rows < problem.m
    negative = factors.present & ~free & (weighted < -_TIGHT * scale)
    very_negative = factors.present & ~free & (weighted < -4 * tolerance * scale)
    weak = factors.present & ~free & (weighted <= 4 * tolerance * scale)
    if bool(weak.any()):
        index = weak.any(-1).nonzero().squeeze(-1)
        kept = factors._replace(present=factors.present & ~weak).at(index)
        rows = inside(kept, problem.c.shape[1])
        part = factor_rows(problem.at(index), kept.cholesky, rows, kept.refined)
        factors = put(factors, index, part)
        x, y, slack, terms, factors = _refined_solution(problem, factors, length, adaptive)
    off = torch.where(problem.is_equality, slack.abs(), -slack)
    finite_x = torch.isfinite(x).all(-1)
    tight = (off <= _TIGHT * terms).all(-1) & ~negative.any(-1) & finite_x
    loose = (off <= 4 * tolerance * terms).all(-1) & ~very_negative.any(-1) & finite_x
    return _State(x, y, (off > _TIGHT * terms) & ~problem.is_equality, tight, loose, factors)


def _refined_solution(
    problem: Problem, factors: Factors, length: Tensor, adaptive: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Factors]:
    """x, y, slack, the size of the slack's terms, and the factors with as many steps of refinement as were needed."""
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
        terms = problem.c.abs() + length * torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        missed = (slack.abs() > _ROUNDING * terms).gather(1, factors.rows) & factors.present
        more = missed.any(-1) & (factors.refined < _MOST_STEPS)
        if not adaptive or not bool(more.any()):
            return x, y, slack, terms, factors
        factors = factors._replace(refined=factors.refined + more)


def _polish_some(problem: Problem, state: _State, which: Tensor, tolerance: Tensor) -> _State:
    index = which.nonzero().squeeze(-1)
    if not len(index):
        return state
    return state.put(index, _polish(problem.at(index), state.at(index), tolerance[index]))


def _polish(problem: Problem, state: _State, tolerance: Tensor) -> _State:
    """Exchange rows by refined quantities until none is wrong. If that fails, the best answer so far is returned."""
    best = state
    count = problem.c.shape[1]
    order = torch.arange(count, device=state.x.device)
    for attempt in range(_POLISHING):
        index = (~best.tight).nonzero().squeeze(-1)
        if not len(index):
            break
        now, sub, tol = state.at(index), problem.at(index), tolerance[index]
        rows = inside(now.factors, count)
        wrong = now.wrong & ~rows
        if attempt >= _POLISHING // 2:
            wrong &= order == torch.where(wrong, order, -1).amax(-1, keepdim=True)
        refined = now.factors.refined.clamp(min=1)
        factors = factor_rows(sub, now.factors.cholesky, rows | wrong | problem.is_equality, refined)
        new = _judge(sub, factors, tol, True)
        state = state.put(index, new)
        better = (new.tight | (new.loose & ~best.loose[index])).nonzero().squeeze(-1)
        if len(better):
            best = best.put(index[better], new.at(better))
    return best


def _solve_again(problem: Problem, index: Tensor, state: _State, tolerance: Tensor) -> tuple[_State, Tensor]:
    """Solve the problems at ``index`` by the dual active-set method. Where it fails, a loose answer is kept."""
    status = torch.zeros(problem.batch, dtype=torch.long, device=index.device)
    good_data = finite(problem.at(index))
    status[index[~good_data]] = int(Status.NOT_FINITE)
    index = index[good_data]
    if not len(index):
        return state, status
    sub, before, tol = problem.at(index), state.at(index), tolerance[index]
    active, outcome = dual_active_set(sub, before.factors.cholesky, tol)
    factors = factor_rows(sub, before.factors.cholesky, active, before.factors.refined.clamp(min=1))
    part = _polish(sub, _judge(sub, factors, tol, True), tol)
    keep = (before.loose & ~part.tight & ~(part.loose & (outcome == 0))).nonzero().squeeze(-1)
    if len(keep):
        part = part.put(keep, before.at(keep))
        outcome[keep] = int(Status.SOLVED)
    status[index] = torch.where((outcome == 0) & ~part.loose, int(Status.NOT_CONVERGED), outcome)
    return state.put(index, part), status
