r"""The exact solution at given rows of one problem, and the check that it is one; compiled.

The conditions and their tolerances are those of ``_active_set/judge.py``.
"""

from __future__ import annotations

import numpy as np

from newton_plugin.convex._compiled.jit import subroutine
from newton_plugin.convex._compiled.kkt import System, solve_system
from newton_plugin.convex._compiled.linear import negate, norm_in, norm_per
from newton_plugin.convex._compiled.rows import all_slacks, fresh_factor

__all__ = ["refine_and_certify"]

ROUNDING, TIGHT, MOST_STEPS = 1e-14, 1e-13, 3  # as in _active_set/judge.py


@subroutine
def refine_and_certify(program, start, pool, working, f, steps, adaptive, x, y, scratch):
    """x, and y at rows[:f], which lose their weakly active rows. Returns (f, or -1 if not certified; steps)."""
    kept, steps = _at_rows(program, start, pool, working, f, steps, adaptive, x, y, scratch)
    if 0 <= kept < f:
        f = kept
        kept, steps = _at_rows(program, start, pool, working, f, steps, adaptive, x, y, scratch)
    return (f if kept == f else -1), steps


@subroutine
def _at_rows(program, start, pool, working, f, steps, adaptive, x, y, scratch):
    """x, and y at rows[:f]. Returns (f if certified, fewer if rows are weakly active, -1 if it fails; steps)."""
    if not fresh_factor(program, pool, working, f, scratch.ry):
        return -1, steps
    if adaptive:
        steps = max(steps, _steps_for_dependence(working.R, scratch.ry, f))
    steps, size = _refine(program, start, pool, working, f, steps, adaptive, x, y, scratch)
    kept = _drop_weak(program, working, f, y, start.tolerance)
    if kept == f and not _slacks_hold(program, start, working, x, scratch.slack, size):
        return -1, steps
    return kept, steps


@subroutine
def _steps_for_dependence(R, diagonal, f):
    """Steps of refinement that nearly dependent rows ask for.

    S has lost as many digits as its rows are dependent: pivot / diagonal is a squared sine.
    """
    sine = 1.0
    for t in range(f):
        sine = min(sine, R[t, t] ** 2 / diagonal[t])
    return 2 if sine < 1e-6 else 1 if sine < 1e-3 else 0


@subroutine
def _refine(program, start, pool, working, f, steps, adaptive, x, y, scratch):
    """The solution at rows[:f], with steps of refinement until these rows hold. Returns (steps, |x|)."""
    rx, ry, slack, work = scratch.rx, scratch.ry, scratch.slack, scratch.work
    system = System(program.Q, program.A, program.G, pool.L, working.R, working.rows)
    _right_hand_side(program, working, f, rx, ry)
    while True:
        solve_system(system, f, steps, rx, ry, x, y, work)
        all_slacks(program, x, slack)
        size = norm_per(program.unit, x, x.size)
        if not adaptive or steps >= MOST_STEPS or _rows_hold(program, start, working, f, slack, size):
            return steps, size
        steps += 1


@subroutine
def _right_hand_side(program, working, f, rx, ry):
    """(rx, ry) = (-p, c at rows[:f])."""
    c, rows = program.c, working.rows
    negate(rx, program.p, rx.size)
    for t in range(f):
        ry[t] = c[rows[t]]


@subroutine
def _rows_hold(program, start, working, f, slack, size):
    """Whether rows[:f] hold up to rounding at x, of norm ``size``."""
    c, length, rows = program.c, program.length, working.rows
    for t in range(f):
        r = rows[t]
        allowed = ROUNDING * (abs(c[r]) + length[r] * (size + start.tolerance * start.descent))
        if not (abs(slack[r]) <= allowed):
            return False
    return True


@subroutine
def _drop_weak(program, working, f, y, tolerance):
    """Take the weakly active rows out of rows[:f]. How many are left; -1 if a multiplier is negative."""
    length, rows, inside = program.length, working.rows, working.inside
    m, scale = program.A.shape[0], norm_in(program.unit, program.p, program.p.size)
    for t in range(f):
        scale = max(scale, abs(y[t]) * length[rows[t]])
    kept = 0
    for t in range(f):
        r = rows[t]
        if r >= m and y[t] * length[r] < -TIGHT * scale:
            return -1
        if r >= m and y[t] * length[r] <= 4 * tolerance * scale:
            inside[r] = 0
        else:
            rows[kept] = r
            kept += 1
    return kept


@subroutine
def _slacks_hold(program, start, working, x, slack, size):
    """Whether x, of norm ``size``, is finite and meets all constraints to the last digits; working rows, exactly."""
    A, G, c, length, inside = program.A, program.G, program.c, program.length, working.inside
    m = A.shape[0]
    if not (size < np.inf):
        return False
    for r in range(c.size):
        off = abs(slack[r]) if r < m or inside[r] else -slack[r]
        rest = off - ROUNDING * length[r] * (size + start.tolerance * start.descent)
        if not (rest <= TIGHT * abs(c[r])):
            row = A[r] if r < m else G[r - m]
            terms = abs(c[r])
            for j in range(x.size):
                terms += abs(row[j] * x[j])
            if not (rest <= TIGHT * terms):
                return False
    return True
