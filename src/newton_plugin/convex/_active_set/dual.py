r"""The dual active-set method of Goldfarb and Idnani, for a batch in lockstep: it ends, whatever the rows are.

Start at the unconstrained minimiser and add violated rows one at a time. With V the whitened rows (``pivoting.py``)
scaled to length one, W the rows in force and T = (V_W' V_W)^-1, adding row j moves

    its multiplier          y_j += t
    the others              y_W -= t r         r = T V_W' V_j
    the slacks              s   += t V'(V_j - V_W r)
    so that its own slack   s_j += t d         d = |V_j - V_W r|^2   (squared distance to the span of W)

A full step makes s_j = 0, and j joins W. A row of W whose multiplier would turn negative on the way leaves first.
Where d = 0 and no row can leave, the multipliers may grow without bound: the rows contradict each other, and
(y_W, y_j) proves it (Farkas). So the method finds an independent set of rows even among duplicates, and it never
returns a solution of an infeasible problem.

Source: Goldfarb and Idnani, "A numerically stable dual method for solving strictly convex quadratic programs",
Mathematical Programming 1983. T is kept by rank-one updates; the caller solves once more at the rows found, from
a fresh factorisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin.convex._status import Status
from newton_plugin.convex._system.problem import Problem, zero_tolerance
from newton_plugin.convex._system.products import cholesky_apply, times, times_transposed
from newton_plugin.convex._system.rows import whiten
from newton_plugin.convex._system.units import row_lengths, size_in, unit_of

__all__ = ["dual_active_set"]

_DEPENDENT = 1e-20  # squared distance of a row of length one to the span of the others
_CONTAINED = 1e-12  # the same as a sine, for equalities, which are compared all at once
_SEPARATE = 1e-4  # sine of the angle to the others, below which equalities are replaced by orthogonal ones
_EPS = torch.finfo(torch.float64).eps


class _State:
    """Of each problem: the rows in force, in the slots of T, and the multipliers and slacks of all rows."""

    def __init__(self, problem: Problem, cholesky: Tensor, tolerance: Tensor) -> None:
        x0 = -cholesky_apply(cholesky, problem.p)
        V = whiten(cholesky, problem.C).expand(problem.batch, -1, -1)
        self.size = torch.linalg.vector_norm(V, dim=1)
        safe = torch.where(self.size > 0, self.size, 1.0)
        self.V = V / safe.unsqueeze(1)
        batch, n, rows = self.V.shape
        self.slack = (problem.c - times(problem.C, x0)) / safe
        unit = unit_of(cholesky)
        far = row_lengths(problem.C, unit) * size_in(unit, x0) / safe
        bound = problem.c.abs() / safe
        self.terms = bound + far
        # x0 may be much farther away than the solution: of its size only the rounding counts.
        self.limit = tolerance * bound + zero_tolerance(cholesky, problem.batch, 64 * _EPS) * far
        self.y = torch.zeros_like(self.slack)
        self.inside = torch.zeros_like(self.slack, dtype=torch.bool)
        slots = min(n, rows)
        self.T = V.new_zeros(batch, slots, slots)
        self.slot_row = torch.zeros(batch, slots, dtype=torch.long, device=V.device)
        self.used = torch.zeros(batch, slots, dtype=torch.bool, device=V.device)
        self.status = torch.full((batch,), int(Status.NOT_CONVERGED), device=V.device)
        self.each = torch.arange(batch, device=V.device)

    def separate(self, m: int, precision: float) -> None:
        """Replace equalities that are nearly dependent by orthogonal ones with the same solutions.

        T has squared the angle between rows; of an angle of 1e-8 nothing would be left. With V_E = U s Z' the rows
        U' say the same as V_E'. Where s = 0 no row is left, and Z' of the slacks has to be zero.
        """
        E = self.V[..., :m]
        factor, info = torch.linalg.cholesky_ex(E.mT @ E)
        if m < 2 or bool(((info == 0) & (factor.diagonal(dim1=-2, dim2=-1) > _SEPARATE).all(-1)).all()):
            return
        U, s, Zt = torch.linalg.svd(E)
        kept = s > max(_CONTAINED, 8 * precision) * s.amax(-1, keepdim=True).clamp(min=1.0)
        slack = (Zt @ self.slack[:, :m, None]).squeeze(-1)
        rank = s.shape[-1]
        slack[:, :rank] /= torch.where(kept, s, 1.0)
        self.V[..., :m] = 0.0
        self.V[..., :rank] = U[..., :rank] * kept.unsqueeze(-2)
        self.slack[:, :m] = slack
        self.terms[:, :m] = torch.linalg.vector_norm(self.terms[:, :m], dim=-1, keepdim=True)

    def reach(self) -> Tensor:
        """(B, K): the size of the terms of each slack at the present point."""
        return self.terms + torch.linalg.vector_norm(times(self.V, self.y), dim=-1, keepdim=True)

    def direction(self, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """r in the slots, the change of all slacks, and d; for one row (B,) of each problem."""
        column = self.V[self.each, :, row]
        r, residual = torch.zeros_like(self.slot_row, dtype=column.dtype), column
        for _ in range(2):  # the second time removes the part in V_W that rounding left; twice is enough
            products = times_transposed(self.V, residual)
            in_slots = torch.where(self.used, products.gather(1, self.slot_row), 0.0)
            r = r + torch.where(self.used, (self.T * in_slots.unsqueeze(-2)).sum(-1), 0.0)
            spread = torch.zeros_like(self.y).scatter_add_(1, self.slot_row, r)
            residual = column - times(self.V, spread)
        return r, times_transposed(self.V, residual), residual.square().sum(-1)

    def join(self, where: Tensor, row: Tensor, r: Tensor, d: Tensor) -> None:
        """Row joins W: T gets a border, in a free slot."""
        slot = (~self.used).to(torch.uint8).argmax(-1)
        e = torch.where(self.used, r, 0.0)
        e[self.each, slot] = -1.0
        e = e * where.unsqueeze(-1)
        self.T += (e / torch.where(where, d, 1.0).unsqueeze(-1)).unsqueeze(-1) * e.unsqueeze(-2)
        self.slot_row[self.each, slot] = torch.where(where, row, self.slot_row[self.each, slot])
        self.used[self.each, slot] |= where
        self.inside[self.each, row] |= where

    def leave(self, where: Tensor, slot: Tensor) -> None:
        """The row in this slot leaves W: T of the others is a Schur complement of T."""
        column = self.T[self.each, :, slot]
        pivot = column[self.each, slot]
        scaled = column / torch.where(where, pivot, 1.0).unsqueeze(-1) * where.unsqueeze(-1)
        self.T -= scaled.unsqueeze(-1) * column.unsqueeze(-2)
        gone = torch.zeros_like(self.used)
        gone[self.each, slot] = where
        self.T.masked_fill_(gone.unsqueeze(-1) | gone.unsqueeze(-2), 0.0)
        self.used &= ~gone
        row = self.slot_row[self.each, slot]
        self.inside[self.each, row] &= ~where
        self.y[self.each, row] = torch.where(where, 0.0, self.y[self.each, row])


def dual_active_set(
    problem: Problem, cholesky: Tensor, tolerance: Tensor, precision: float = _EPS
) -> tuple[Tensor, Tensor]:
    """Active rows (B, K), and status (B,). The rows are all equalities and independent inequalities.

    ``precision``: the rounding error of the data. Rows that depend on others up to that may contradict them by as much.
    """
    state = _State(problem, cholesky, tolerance)
    dependent = max(_DEPENDENT, (8 * precision) ** 2)
    state.separate(problem.m, precision)
    running = torch.ones_like(state.each, dtype=torch.bool)
    for row in range(problem.m):
        running &= _add_equality(state, running, row, dependent, tolerance, precision)
    state.status[~running] = int(Status.INCONSISTENT)
    batch, rows = state.slack.shape
    if rows == problem.m:
        state.status[running] = int(Status.SOLVED)
        return state.inside | problem.is_equality, state.status
    pending = torch.zeros(batch, dtype=torch.bool, device=cholesky.device)
    row = torch.zeros(batch, dtype=torch.long, device=cholesky.device)
    candidate = (~problem.is_equality).expand(batch, -1).clone()
    for _ in range(20 * (rows + state.V.shape[1]) + 100):
        free = candidate & ~state.inside
        depth = torch.where(free, -state.slack - state.limit, -torch.inf)
        deepest = depth.max(-1)
        state.status[running & ~pending & (deepest.values <= 0)] = int(Status.SOLVED)
        running &= pending | (deepest.values > 0)
        if not bool(running.any()):
            break
        row = torch.where(pending, row, deepest.indices)
        r, change, d = state.direction(row)
        is_inequality = state.used & (state.slot_row >= problem.m)
        held = state.y.gather(1, state.slot_row)
        blocking = torch.where(is_inequality & (r > 1e-14), held.clamp(min=0) / r.clamp(min=1e-300), torch.inf)
        partial = blocking.min(-1)
        independent = d > dependent
        full = torch.where(independent, (-state.slack[state.each, row]).clamp(min=0) / d.clamp(min=1e-300), torch.inf)
        step = torch.minimum(partial.values, full)
        stuck = running & torch.isinf(step)
        reach = torch.clamp(tolerance, min=8 * precision) * state.reach()
        rounding = stuck & (-state.slack[state.each, row] <= reach[state.each, row])
        candidate[state.each, row] &= ~rounding
        pending &= ~rounding
        stuck &= ~rounding
        state.status[stuck] = int(Status.INFEASIBLE)
        running &= ~stuck
        step = torch.where(running & ~rounding, step, 0.0)
        move = torch.where(state.used, r, 0.0) * step.unsqueeze(-1)
        state.y.scatter_add_(1, state.slot_row, -move)
        state.y[state.each, row] += step
        state.slack += torch.where(independent.unsqueeze(-1), change, 0.0) * step.unsqueeze(-1)
        complete = running & ~rounding & (full <= partial.values)
        blocked = running & ~rounding & ~complete
        pending = blocked
        state.join(complete, row, r, d)
        state.leave(blocked, partial.indices)
    return state.inside | problem.is_equality, state.status


def _add_equality(
    state: _State, running: Tensor, row: int, dependent: float, tolerance: Tensor, precision: float
) -> Tensor:
    """Put an equality in force; false where it contradicts the earlier ones."""
    rows = torch.full_like(state.each, row)
    r, change, d = state.direction(rows)
    independent = d > dependent
    adding = running & independent
    step = torch.where(adding, -state.slack[:, row] / torch.where(independent, d, 1.0), 0.0)
    state.y.scatter_add_(1, state.slot_row, -torch.where(state.used, r, 0.0) * step.unsqueeze(-1))
    state.y[:, row] += step
    state.slack += change * step.unsqueeze(-1)
    rounding = torch.clamp(10 * tolerance.squeeze(-1), min=8 * precision) * state.reach()[:, row]
    consistent = independent | (state.slack[:, row].abs() <= rounding + 1e-12 * state.y.abs().amax(-1))
    if bool(adding.any()):
        state.join(adding, rows, r, d)
    return consistent
