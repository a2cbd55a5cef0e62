"""One strictly convex QP, compiled: where the search starts, which rows are active, and the solution at these rows."""

from __future__ import annotations

import numpy as np

from newton_plugin.convex._compiled.certify import refine_and_certify
from newton_plugin.convex._compiled.dual import dual
from newton_plugin.convex._compiled.jit import subroutine
from newton_plugin.convex._compiled.linear import down, negate, norm, norm_per, up
from newton_plugin.convex._compiled.pivoting import pivot
from newton_plugin.convex._compiled.rows import all_slacks
from newton_plugin.convex._compiled.workspace import Start

__all__ = ["solve_one"]

_EPS = 2.0**-52
_ILL_CONDITIONED = 1e3  # as in _active_set/solve.py


@subroutine
def solve_one(program, pool, working, steps, adaptive, x, y, scratch):
    """One problem, Q = L L': x, and y at the rows[:f]. Returns (f, or -1 if not certified; steps)."""
    if adaptive and _condition(pool.L) > _ILL_CONDITIONED:
        steps = max(steps, 1)
    start = _without_constraints(program, pool, scratch)
    if not _is_finite(program, start):
        return -1, steps
    f = _select_rows(program, start, pool, working, scratch)
    if f < 0:
        return -1, steps
    return refine_and_certify(program, start, pool, working, f, steps, adaptive, x, y, scratch)


@subroutine
def _condition(L):
    """A lower estimate of the condition of Q = L L'."""
    smallest, greatest = np.inf, 0.0
    for i in range(L.shape[0]):
        smallest, greatest = min(smallest, L[i, i]), max(greatest, L[i, i])
    return (greatest / smallest) ** 2


@subroutine
def _condition_in(unit, L):
    """The same in the units of the variables, in which Q has a diagonal of ones."""
    smallest, greatest = np.inf, 0.0
    for i in range(L.shape[0]):
        size = L[i, i] * unit[i]
        smallest, greatest = min(smallest, size), max(greatest, size)
    return (greatest / smallest) ** 2


@subroutine
def _without_constraints(program, pool, scratch):
    """Where the search starts; the tolerance grows with the condition of Q, as rounding does."""
    tolerance = min(max(4 * _EPS * _condition_in(program.unit, pool.L), 1e-11), 1e-7)
    descent = _minimise(program, pool, scratch.start_x)
    all_slacks(program, scratch.start_x, scratch.start_slack)
    _limits(program, tolerance, scratch.start_x, scratch.limit)
    return Start(scratch.start_x, scratch.start_slack, scratch.limit, tolerance, descent)


@subroutine
def _minimise(program, pool, x):
    """x = -Q^-1 p; returns |L^-1 p|."""
    L, n = pool.L, x.size
    negate(x, program.p, n)
    down(L, n, x)
    descent = norm(x, n)
    up(L, n, x)
    return descent


@subroutine
def _limits(program, tolerance, x, limit):
    """Below -limit a slack is negative."""
    c, length, size = program.c, program.length, norm_per(program.unit, x, x.size)
    for r in range(c.size):
        limit[r] = tolerance * (abs(c[r]) + length[r] * size)


@subroutine
def _is_finite(program, start):
    """Whether the data hold no NaN and no infinity, as far as the start shows it."""
    c, length = program.c, program.length
    fine = start.descent < np.inf
    for r in range(c.size):
        fine &= abs(c[r]) < np.inf and length[r] < np.inf
    return fine


@subroutine
def _select_rows(program, start, pool, working, scratch):
    """The active rows, by pivoting or else by the dual method. Returns f: they are rows[:f]; -1 if both fail."""
    _reset(pool)
    f = pivot(program, start, pool, working, scratch)
    return f if f >= 0 else dual(program, start, pool, working, scratch)


@subroutine
def _reset(pool):
    """The pool of the last problem is forgotten, unless the batch shares it."""
    slot, shared = pool.slot, pool.shared
    for r in range(slot.size):
        slot[r] = r if shared else -1
