r"""Strictly convex QPs one at a time, compiled: the active rows, the exact solution, and its check.

Methods and tolerances are those of the torch path (``_active_set``). Two things differ. Each problem is solved alone,
so nothing depends on its neighbours. And factors are extended instead of being computed again. At the end the factor of
the active rows is computed once more, from the rows in ascending order. So x, the multipliers and all gradients depend
on the problem and its active rows alone: a problem has the same bits alone, in a batch, and with matrices that are
shared or its own.

A problem that is not certified here is marked as such and left to the general path. The reasons are a singular or
indefinite Q, dependent equalities, no solution, or conditions that do not hold to the last digits. This code never
reports that a problem has no solution.
"""

from __future__ import annotations

import numpy as np

from newton_plugin.convex._compiled.jit import kernel, subroutine
from newton_plugin.convex._compiled.linear import clear, count_up, norm_in
from newton_plugin.convex._compiled.rows import cholesky_of, enter_pool
from newton_plugin.convex._compiled.solve_one import solve_one
from newton_plugin.convex._compiled.workspace import Pool, Program, WorkingRows, entry, make_scratch

__all__ = ["solve"]


@subroutine
def _units(program):
    """unit = 1 / sqrt(Q_jj), and length = the norms of the rows of [A; G] in these units."""
    Q, A, G, unit, length = program.Q, program.A, program.G, program.unit, program.length
    m, n = A.shape
    for j in range(n):
        unit[j] = 1.0 / np.sqrt(Q[j, j])
    for r in range(length.size):
        length[r] = norm_in(unit, A[r] if r < m else G[r - m], n)


@subroutine
def _whole_pool(program, pool, new):
    """All rows in the pool, in order."""
    count = program.c.size
    count_up(new, count)
    enter_pool(program, pool, new, count, 0)


@subroutine
def _right_hand_side(b, h, c):
    """c = (b, h), with +-1e300 in place of infinity."""
    m = b.size
    for r in range(m):
        c[r] = b[r]
    for r in range(h.size):
        c[m + r] = np.nan if np.isnan(h[r]) else min(max(h[r], -1e300), 1e300)


@kernel(
    "void(float64[:,:,::1], float64[:,::1], float64[:,:,::1], float64[:,::1], float64[:,:,::1], float64[:,::1], int64, "
    "boolean, boolean, float64[:,::1], float64[:,::1], boolean[:,::1], float64[:,:,::1], float64[:,:,::1], "
    "int64[:,::1], int64[:,::1])"
)
def solve(Q, p, A, b, G, h, steps, adaptive, shared, x, y, active, factor, schur, working_rows, report):
    """B problems; each of Q, p, A, b, G, h has B entries, or one for all.

    ``steps``: of refinement, at least; ``adaptive``: more where residuals ask for it; ``shared``: Q, A and G have
    one entry. Written: x (B, n), y (B, K), active (B, K), the factors L (B or 1, n, n), R (B, w, w) and working rows
    (B, w), of which the first f count, and ``report`` (B, 3): f, steps, 1 if certified.
    """
    batch, n, m, k = x.shape[0], p.shape[1], b.shape[1], h.shape[1]
    count = m + k
    c, unit, length, inside = np.empty(count), np.empty(n), np.empty(count), np.empty(count, np.uint8)
    V, S, slot, u = np.empty((count, n)), np.empty((count, count)), np.empty(count, np.int64), np.empty(max(count, 1))
    scratch = make_scratch(n, count)
    definite = False
    for e in range(batch):
        program = Program(entry(Q, e), entry(p, e), entry(A, e), entry(G, e), c, unit, length)
        pool = Pool(entry(factor, e), V, S, slot, shared)
        working = WorkingRows(schur[e], working_rows[e], inside)
        if e == 0 or Q.shape[0] > 1:
            definite = cholesky_of(program.Q, pool.L)
        if definite and (e == 0 or Q.shape[0] > 1 or A.shape[0] > 1 or G.shape[0] > 1):
            _units(program)
        if shared and e == 0 and definite:
            _whole_pool(program, pool, scratch.new)
        clear(report[e], 3)
        if not definite:
            continue
        _right_hand_side(entry(b, e), entry(h, e), c)
        f, taken = solve_one(program, pool, working, steps, adaptive, x[e], u, scratch)
        report[e, 0], report[e, 1], report[e, 2] = max(f, 0), taken, f >= 0
        clear(y[e], count)
        for r in range(count):
            active[e, r] = f >= 0 and inside[r] == 1
        for t in range(f):
            y[e, working.rows[t]] = u[t]
