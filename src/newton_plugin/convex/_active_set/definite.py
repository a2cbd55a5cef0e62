"""Strictly convex QPs: first the active rows, then the solution at these rows to the last digits.

Pivoting decides by quantities that carry the rounding of factorisations. Therefore the solution at its rows is refined
against Q and C, and checked again by *tight* tolerances (``judge.py``). Rows on the wrong side then change places
block by block (active-set polishing), each time by refined quantities. What is still not optimal goes to the dual
active-set method and through the same polishing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from newton_plugin.convex._active_set.dual import dual_active_set
from newton_plugin.convex._active_set.judge import Scale, State, judge, scale_of
from newton_plugin.convex._active_set.pivoting import pivot
from newton_plugin.convex._status import Status
from newton_plugin.convex._system.factors import Factors, factor_rows, inside, no_factors
from newton_plugin.convex._system.problem import MOST_TOLERANCE, Problem, finite, zero_tolerance

__all__ = ["Solved", "solve_definite"]

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


def solve_definite(
    problem: Problem, cholesky: Tensor, refined: Tensor, claim: Tensor | None, adaptive: bool, precision: float
) -> Solved:
    """Solve B problems with Q = L L'.

    ``refined`` (B,): steps of refinement to begin with; ``adaptive``: more where residuals ask for it;
    ``claim``: active rows (B, K) that another solver found; ``precision``: the rounding error of the data.
    """
    scale = scale_of(problem, cholesky, zero_tolerance(cholesky, problem.batch), precision)
    if claim is None:
        pivoted = pivot(problem, cholesky, scale)
        factors = no_factors(cholesky, problem.batch)._replace(
            rows=pivoted.rows, present=pivoted.present, schur=pivoted.schur, refined=refined
        )
        state = judge(problem, factors, scale, adaptive).where(pivoted.found)
    else:
        factors = factor_rows(problem, cholesky, claim | problem.is_equality, refined, precision)
        state = judge(problem, factors, scale, adaptive)
    status = torch.zeros_like(refined)
    if not bool(state.tight.all()):
        # Loose answers are polished first. What is still not tight after that is solved again.
        state = _polish_some(problem, state, state.loose & ~state.tight, scale)
        left = (~state.tight).nonzero().squeeze(-1)
        if len(left):
            state, status = _solve_again(problem, left, state, scale)
        # Where Q is all but singular, its own minimiser is far away, and what is loose relative to that says little.
        poor = ~state.tight & (scale.tolerance == MOST_TOLERANCE).squeeze(-1)
        status = torch.where((status == 0) & poor, int(Status.NOT_CONVERGED), status)
    rows = inside(state.factors, problem.c.shape[1])
    return Solved(state.x, state.y, status, rows, torch.ones_like(state.tight), state.factors)


def _polish_some(problem: Problem, state: State, which: Tensor, scale: Scale) -> State:
    index = which.nonzero().squeeze(-1)
    if not len(index):
        return state
    return state.put(index, _polish(problem.at(index), state.at(index), scale.at(index)))


def _polish(problem: Problem, state: State, scale: Scale) -> State:
    """Exchange rows by refined quantities until none is wrong. If that fails, the best answer so far is returned."""
    best = state
    count = problem.c.shape[1]
    order = torch.arange(count, device=state.x.device)
    for attempt in range(_POLISHING):
        index = (~best.tight).nonzero().squeeze(-1)
        if not len(index):
            break
        now, sub, near = state.at(index), problem.at(index), scale.at(index)
        rows = inside(now.factors, count)
        wrong = now.wrong & ~rows
        if attempt >= _POLISHING // 2:
            wrong &= order == torch.where(wrong, order, -1).amax(-1, keepdim=True)
        refined = now.factors.refined.clamp(min=1)
        factors = factor_rows(sub, now.factors.cholesky, rows | wrong | problem.is_equality, refined, scale.precision)
        new = judge(sub, factors, near, True)
        state = state.put(index, new)
        better = (new.tight | (new.loose & ~best.loose[index])).nonzero().squeeze(-1)
        if len(better):
            best = best.put(index[better], new.at(better))
    return best


def _solve_again(problem: Problem, index: Tensor, state: State, scale: Scale) -> tuple[State, Tensor]:
    """Solve the problems at ``index`` by the dual active-set method. Where it fails, a loose answer is kept."""
    status = torch.zeros(problem.batch, dtype=torch.long, device=index.device)
    good_data = finite(problem.at(index))
    status[index[~good_data]] = int(Status.NOT_FINITE)
    index = index[good_data]
    if not len(index):
        return state, status
    sub, before, near = problem.at(index), state.at(index), scale.at(index)
    active, outcome = dual_active_set(sub, before.factors.cholesky, near.tolerance, scale.precision)
    refined = before.factors.refined.clamp(min=1)
    factors = factor_rows(sub, before.factors.cholesky, active, refined, scale.precision)
    part = _polish(sub, judge(sub, factors, near, True), near)
    keep = (before.loose & ~part.tight & ~(part.loose & (outcome == 0))).nonzero().squeeze(-1)
    if len(keep):
        part = part.put(keep, before.at(keep))
        outcome[keep] = int(Status.SOLVED)
    outcome = torch.where(part.tight, int(Status.SOLVED), outcome)
    status[index] = torch.where((outcome == 0) & ~part.loose, int(Status.NOT_CONVERGED), outcome)
    return state.put(index, part), status
