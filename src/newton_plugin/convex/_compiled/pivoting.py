r"""Which rows are active: block principal pivoting, and the dual active-set method where it gives up; compiled.

The methods, the exchange rule and the tolerances are those of ``_pivoting`` and ``_dual_active_set``, for one problem.
"""

from __future__ import annotations

import numpy as np

from newton_plugin.convex._compiled.linear import add, dot, down, jit, up
from newton_plugin.convex._compiled.rows import DEPENDENT, at_rows, enter, extend_rows

__all__ = ["dual", "pivot"]

_ROUNDS = 40


@jit()
def deepest(length, inside, s, limit, m):
    """The depth of the most violated inequality, in units of x, and that row; 0 and -1 if there is none."""
    depth, row = 0.0, -1
    for r in range(m, length.size):
        if not inside[r] and s[r] < -limit[r] and s[r] / max(length[r], 1e-300) < depth:
            depth, row = s[r] / max(length[r], 1e-300), r
    return depth, row


@jit()
def pivot(A, G, c, length, L, V, S, slot, shared, R, rows, inside, tol, x0, s0, descent, limit, vectors):
    """Block principal pivoting: guess F until no row is wrong. The number of rows in rows[:f], or -1."""
    m, count = A.shape[0], c.size
    y, s, x, new = vectors
    held = count if shared else 0
    f, known, fewest, patience, entering = 0, 0, count + 1, 3, m
    for r in range(count):
        inside[r] = 0
        new[r] = r
    if m == 0:
        depth, _ = deepest(length, inside, s0, limit, 0)
        for r in range(count):
            if s0[r] < -limit[r] and s0[r] / max(length[r], 1e-300) <= 0.3 * depth:
                new[entering] = r
                entering += 1
    for _ in range(_ROUNDS):
        if f + entering > R.shape[0]:
            return -1
        w = 0
        for t in range(entering):
            r = new[t]
            rows[f + t], inside[r] = r, 1
            if slot[r] < 0:
                new[w] = r
                w += 1
        f += entering
        if w:
            enter(A, G, L, V, S, slot, new, w, held)
            held += w
        if not extend_rows(S, slot, R, rows, known, f):
            return -1
        known = f
        at_rows(A, G, c, L, V, S, slot, shared, R, rows, f, x0, s0, y, s, x)
        scale = descent
        for t in range(f):
            r = slot[rows[t]]
            scale = max(scale, abs(y[t]) * np.sqrt(S[r, r]))
        depth, _ = deepest(length, inside, s, limit, m)
        wrong, last = 0, -1
        for t in range(f):
            r = rows[t]
            if r >= m and y[t] * np.sqrt(S[slot[r], slot[r]]) < -tol * scale:
                wrong += 1
                last = max(last, r)
        for r in range(m, count):
            if not inside[r] and s[r] < -limit[r]:
                wrong += 1
                last = max(last, r)
        if wrong == 0:
            return f
        patience = 3 if wrong < fewest else patience - 1
        fewest = min(fewest, wrong)
        block = patience >= 0
        kept, entering = 0, 0
        for r in range(m, count):
            violated = not inside[r] and s[r] < -limit[r]
            if violated and (s[r] / max(length[r], 1e-300) <= 0.3 * depth if block else r == last):
                new[entering] = r
                entering += 1
        for t in range(f):
            r = rows[t]
            leaves = r >= m and y[t] * np.sqrt(S[slot[r], slot[r]]) < -tol * scale
            if leaves and (block or r == last):
                inside[r] = 0
                known = min(known, kept)
            else:
                rows[kept] = r
                kept += 1
        f = kept
    return -1


@jit()
def dual(A, G, c, length, L, V, S, slot, shared, R, rows, inside, x0, s0, limit, vectors, r):
    """The dual active-set method (``_dual_active_set``) where pivoting gave up. The number of rows in rows[:f], or -1.

    With r = S_WW^-1 S_Wj and d = S_jj - S_jW r a step t moves y_j by t, y_W by -t r and s_j by t d.
    """
    n, m, count = A.shape[1], A.shape[0], c.size
    y, s, x, new = vectors
    held, f = count if shared else 0, m
    for j in range(count):
        inside[j] = j < m
        slot[j] = j if shared else -1
        new[j] = j
    if m > R.shape[0]:
        return -1
    if m and not shared:
        enter(A, G, L, V, S, slot, new, m, 0)
        held = m
    for t in range(m):
        rows[t] = t
    if not extend_rows(S, slot, R, rows, 0, f):
        return -1
    for _ in range(2 * count + n + 20):
        at_rows(A, G, c, L, V, S, slot, shared, R, rows, f, x0, s0, y, s, x)
        _, j = deepest(length, inside, s, limit, m)
        if j < 0:
            return f
        if slot[j] < 0:
            new[0] = j
            enter(A, G, L, V, S, slot, new, 1, held)
            held += 1
        own, depth = S[slot[j], slot[j]], -s[j]
        while True:
            for t in range(f):
                r[t] = S[slot[j], slot[rows[t]]]
            down(R, f, r)
            d = own - dot(r, r, f)
            up(R, f, r)
            independent = d > 10 * DEPENDENT * own
            full = depth / d if independent else np.inf
            partial, leaving = np.inf, -1
            for t in range(f):
                if rows[t] >= m and r[t] > 0 and max(y[t], 0.0) / r[t] < partial:
                    partial, leaving = max(y[t], 0.0) / r[t], t
            if not (min(full, partial) < np.inf):
                return -1
            step = min(full, partial)
            add(y, -step, r, f)
            if full <= partial:
                rows[f], inside[j] = j, 1
                f += 1
                if f > R.shape[0] or not extend_rows(S, slot, R, rows, f - 1, f):
                    return -1
                break
            if independent:
                depth -= step * d
            inside[rows[leaving]] = 0
            f -= 1
            for t in range(leaving, f):
                rows[t], y[t] = rows[t + 1], y[t + 1]
            if not extend_rows(S, slot, R, rows, leaving, f):
                return -1
    return -1
