r"""Which rows are active, where pivoting gives up: the dual active-set method for one problem, compiled.

The method is that of ``_active_set/dual.py``. With r = S_WW^-1 S_Wj and d = S_jj - S_jW r a step t moves y_j by t,
y_W by -t r and s_j by t d.
"""

from __future__ import annotations

import numpy as np

from newton_plugin.convex._compiled.jit import subroutine
from newton_plugin.convex._compiled.linear import add, count_up, dot, down, up
from newton_plugin.convex._compiled.pivoting import deepest
from newton_plugin.convex._compiled.rows import DEPENDENT, at_rows, enter_pool, extend_factor

__all__ = ["dual"]


@subroutine
def dual(program, start, pool, working, scratch):
    """Add violated rows one at a time until none is left. Returns f: rows[:f] are active; -1 if it fails."""
    n, m, count = program.A.shape[1], program.A.shape[0], program.c.size
    slot, new = pool.slot, scratch.new
    if m > working.R.shape[0]:
        return -1
    held, f = _equalities(pool, working, new, m), m
    if m and not pool.shared:
        enter_pool(program, pool, new, m, 0)
    if not extend_factor(pool, working, 0, f):
        return -1
    for _ in range(2 * count + n + 20):
        at_rows(program, start, pool, working, f, scratch)
        _, j = deepest(program.length, working.inside, scratch.slack, start.limit, m)
        if j < 0:
            return f
        if slot[j] < 0:
            new[0] = j
            enter_pool(program, pool, new, 1, held)
            held += 1
        f = _add_row(pool, working, scratch, f, j, m)
        if f < 0:
            return -1
    return -1


@subroutine
def _equalities(pool, working, new, m):
    """Begin with the equalities as working rows. How many rows the pool is to hold."""
    rows, inside, slot, shared = working.rows, working.inside, pool.slot, pool.shared
    for j in range(slot.size):
        inside[j] = j < m
        slot[j] = j if shared else -1
    count_up(new, m)
    count_up(rows, m)
    return slot.size if shared else m


@subroutine
def _add_row(pool, working, scratch, f, j, m):
    """Make row j a working row; rows whose multipliers would turn negative leave first. Returns f, or -1."""
    R, rows, inside = working.R, working.rows, working.inside
    S, slot, y, r = pool.S, pool.slot, scratch.y, scratch.ry
    own, depth = S[slot[j], slot[j]], -scratch.slack[j]
    while True:
        for t in range(f):
            r[t] = S[slot[j], slot[rows[t]]]
        down(R, f, r)
        d = own - dot(r, r, f)
        up(R, f, r)
        independent = d > 10 * DEPENDENT * own
        full = depth / d if independent else np.inf
        partial, leaving = _first_to_leave(rows, y, r, f, m)
        step = min(full, partial)
        if not (step < np.inf):
            return -1
        add(y, -step, r, f)
        if full <= partial:
            if f == R.shape[0]:
                return -1
            rows[f], inside[j] = j, 1
            return f + 1 if extend_factor(pool, working, f, f + 1) else -1
        if independent:
            depth -= step * d
        inside[rows[leaving]] = 0
        f -= 1
        for t in range(leaving, f):
            rows[t], y[t] = rows[t + 1], y[t + 1]
        if not extend_factor(pool, working, leaving, f):
            return -1


@subroutine
def _first_to_leave(rows, y, r, f, m):
    """The step at which the first multiplier reaches zero, and its place in ``rows``; infinity and -1 if none does."""
    partial, leaving = np.inf, -1
    for t in range(f):
        if rows[t] >= m and r[t] > 0 and max(y[t], 0.0) / r[t] < partial:
            partial, leaving = max(y[t], 0.0) / r[t], t
    return partial, leaving
