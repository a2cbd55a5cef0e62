r"""Strictly convex QPs one at a time, compiled: the active rows, the exact solution, and its judge.

Methods and tolerances are those of the torch path (``_pivoting``, ``_dual_active_set``, ``_definite``). What differs is
that a problem is carried through alone, so that nothing depends on its neighbours, and that factors are extended
instead of made anew. At the end the factor of the active rows is made once more, from the rows in ascending order. So
x, the multipliers and all gradients depend on the problem and its active rows alone: a problem has the same bits alone,
in a batch, and with matrices shared or its own.

A problem that is not certified here (singular or indefinite Q, dependent equalities, no solution, conditions that do
not hold to the last digits) is marked as such and left to the general path: this file gives answers, never a verdict
that there is none.
"""

from __future__ import annotations

import numpy as np

from newton_plugin.convex._compiled.linear import clear, down, jit, norm, solve_rows, up
from newton_plugin.convex._compiled.pivoting import dual, pivot
from newton_plugin.convex._compiled.rows import all_slacks, cholesky_of, enter, fresh_rows

__all__ = ["solve"]

_EPS = 2.0**-52
_ROUNDING, _TIGHT, _MOST_STEPS = 1e-14, 1e-13, 3  # as in _definite


@jit()
def _one(Q, p, A, G, c, length, L, V, S, slot, shared, R, rows, inside, x, y, steps, adaptive, work, vectors):
    """One problem, Q = L L': x, y at rows[:f] and these rows. Returns (f, or -1 if not certified; steps)."""
    n, m, count = p.size, A.shape[0], c.size
    x0, s0, limit, s, rx, ry = work[5], work[6], work[7], work[8], work[9], work[10]
    smallest, greatest = np.inf, 0.0
    for i in range(n):
        smallest, greatest = min(smallest, L[i, i]), max(greatest, L[i, i])
    condition = (greatest / smallest) ** 2
    tol = min(max(4 * _EPS * condition, 1e-11), 1e-7)
    if adaptive and condition > 1e3:
        steps = max(steps, 1)
    for i in range(n):
        x0[i] = -p[i]
    down(L, n, x0)
    descent = norm(x0, n)
    up(L, n, x0)
    fine = descent < np.inf
    for r in range(count):
        fine &= abs(c[r]) < np.inf and length[r] < np.inf
    if not fine:
        return -1, steps
    size = norm(x0, n)
    all_slacks(A, G, c, x0, s0)
    for r in range(count):
        limit[r] = tol * (abs(c[r]) + length[r] * size)
        slot[r] = r if shared else -1
    f = pivot(A, G, c, length, L, V, S, slot, shared, R, rows, inside, tol, x0, s0, descent, limit, vectors)
    if f < 0:
        f = dual(A, G, c, length, L, V, S, slot, shared, R, rows, inside, x0, s0, limit, vectors, ry)
    if f < 0:
        return -1, steps
    for i in range(n):
        rx[i] = -p[i]
    strength = norm(p, n)
    for attempt in range(2):
        if not fresh_rows(A, G, L, V, R, rows, f, ry):
            return -1, steps
        if adaptive:  # S has lost as many digits as its rows are dependent: pivot / diagonal is a squared sine
            sine = 1.0
            for t in range(f):
                sine = min(sine, R[t, t] ** 2 / ry[t])
            steps = max(steps, 2 if sine < 1e-6 else 1 if sine < 1e-3 else 0)
        for t in range(f):
            ry[t] = c[rows[t]]
        while True:
            solve_rows(Q, A, G, L, R, rows, f, steps, rx, ry, x, y, work)
            all_slacks(A, G, c, x, s)
            size = norm(x, n)
            missed = False
            for t in range(f):
                r = rows[t]
                if not (abs(s[r]) <= _ROUNDING * (abs(c[r]) + length[r] * size)):
                    missed = True
            if not (adaptive and missed and steps < _MOST_STEPS):
                break
            steps += 1
        scale = strength
        for t in range(f):
            scale = max(scale, abs(y[t]) * length[rows[t]])
        kept = 0
        for t in range(f):
            r = rows[t]
            if r >= m and y[t] * length[r] < -_TIGHT * scale:
                return -1, steps
            if r >= m and y[t] * length[r] <= 4 * tol * scale:  # weakly active: left out
                inside[r] = 0
            else:
                rows[kept] = r
                kept += 1
        if kept == f:
            break
        if attempt == 1:
            return -1, steps
        f = kept
    if not (size < np.inf):
        return -1, steps
    for r in range(count):
        off = abs(s[r]) if r < m else -s[r]
        if not (off <= _TIGHT * (abs(c[r]) + length[r] * size)):
            return -1, steps
    return f, steps


@jit(
    "void(float64[:,:,::1], float64[:,::1], float64[:,:,::1], float64[:,::1], float64[:,:,::1], float64[:,::1], int64, "
    "boolean, boolean, float64[:,::1], float64[:,::1], boolean[:,::1], float64[:,:,::1], float64[:,:,::1], "
    "int64[:,::1], int64[:,::1])"
)
def solve(Q, p, A, b, G, h, start, adaptive, shared, x, y, active, factor, schur, working, report):
    """B problems; each of Q, p, A, b, G, h has B entries, or one for all.

    ``start``: steps of refinement at least; ``adaptive``: more where residuals ask for it; ``shared``: Q, A and G have
    one entry. Written: x (B, n), y (B, K), active (B, K), the factors L (B or 1, n, n), R (B, w, w) and working rows
    (B, w), of which the first f count, and ``report`` (B, 3): f, steps, 1 if certified.
    """
    batch, n, m, k = x.shape[0], p.shape[1], b.shape[1], h.shape[1]
    count = m + k
    length, c, u = np.empty(count), np.empty(count), np.empty(max(count, 1))
    slot, inside = np.empty(count, np.int64), np.empty(count, np.uint8)
    new = np.empty(max(count, 1), np.int64)
    work = np.zeros((11, max(n, count, 1)))
    vectors = (np.empty(max(count, 1)), np.empty(count), np.empty(n), new)
    V, S = np.empty((count, n)), np.empty((count, count))
    good = False
    for e in range(batch):
        Qe, pe = Q[min(e, Q.shape[0] - 1)], p[min(e, p.shape[0] - 1)]
        Ae, Ge = A[min(e, A.shape[0] - 1)], G[min(e, G.shape[0] - 1)]
        L = factor[min(e, factor.shape[0] - 1)]
        if e == 0 or Q.shape[0] > 1:
            good = cholesky_of(Qe, L)
        if e == 0 or A.shape[0] > 1 or G.shape[0] > 1:
            for r in range(count):
                length[r] = norm(Ae[r] if r < m else Ge[r - m], n)
        if shared and e == 0 and good:
            for r in range(count):
                new[r] = r
            enter(Ae, Ge, L, V, S, slot, new, count, 0)
        clear(report[e], 3)
        if not good:
            continue
        for r in range(m):
            c[r] = b[min(e, b.shape[0] - 1), r]
        for r in range(k):
            value = h[min(e, h.shape[0] - 1), r]
            c[m + r] = np.nan if np.isnan(value) else min(max(value, -1e300), 1e300)
        R = schur[e]
        f, steps = _one(
            Qe,
            pe,
            Ae,
            Ge,
            c,
            length,
            L,
            V,
            S,
            slot,
            shared,
            R,
            working[e],
            inside,
            x[e],
            u,
            start,
            adaptive,
            work,
            vectors,
        )
        report[e, 0], report[e, 1], report[e, 2] = max(f, 0), steps, f >= 0
        clear(y[e], count)
        for r in range(count):
            active[e, r] = f >= 0 and inside[r] == 1
        for t in range(f):
            y[e, working[e, t]] = u[t]
