r"""The rows that may be active: whitened, multiplied with each other, and factored; for one problem, compiled.

* Q = L L'. V = (L^-1 C')' and S = V V' = C Q^-1 C' hold the rows that were ever guessed active (the *pool*), each in
  its ``slot``, -1 for none. If a batch shares Q, A and G, they are computed once, for all rows.
* R R' = S at the working rows, in the order in which these entered. Rows that enter extend R. When a row leaves, the
  part of R behind it is computed again.
"""

from __future__ import annotations

from newton_plugin.convex._compiled.jit import subroutine
from newton_plugin.convex._compiled.linear import add, cholesky, clear, copy, down, times, up, whiten

__all__ = ["DEPENDENT", "all_slacks", "at_rows", "cholesky_of", "enter_pool", "extend_factor", "fresh_factor"]

DEPENDENT = 1e-9  # as in _system/rows.py


@subroutine
def cholesky_of(Q, L):
    """L of the symmetric part of Q; False where Q is not safely definite."""
    n = Q.shape[0]
    for i in range(n):
        for j in range(i + 1):
            L[i, j] = 0.5 * (Q[i, j] + Q[j, i])
    return cholesky(L, 0, n, 1e-14 * n)


@subroutine
def enter_pool(program, pool, new, w, held):
    """Put rows new[:w] into the pool, behind the ``held`` rows that are there."""
    A, G, V, S, slot = program.A, program.G, pool.V, pool.S, pool.slot
    n, m = A.shape[1], A.shape[0]
    for t in range(w):
        r = new[t]
        slot[r] = held + t
        copy(V[held + t], A[r] if r < m else G[r - m], n)
    whiten(pool.L, n, V, held, held + w)
    for a in range(held, held + w):
        times(V, a + 1, V[a], n, S[a])
        for k in range(a):
            S[k, a] = S[a, k]


@subroutine
def extend_factor(pool, working, known, f):
    """R for rows[:f], of which the first ``known`` are factored; False if the rows depend on each other."""
    S, slot, R, rows = pool.S, pool.slot, working.R, working.rows
    for i in range(known, f):
        source = S[slot[rows[i]]]
        for j in range(i + 1):
            R[i, j] = source[slot[rows[j]]]
    return cholesky(R, known, f, DEPENDENT)


@subroutine
def fresh_factor(program, pool, working, f, diagonal):
    """R for rows[:f] from the rows alone, sorted first: the same bits however the rows were found.

    V is overwritten; ``diagonal`` receives the diagonal of S. False if the rows depend on each other.
    """
    A, G, V, R, rows = program.A, program.G, pool.V, working.R, working.rows
    n, m = A.shape[1], A.shape[0]
    for t in range(1, f):
        r = rows[t]
        k = t
        while k > 0 and rows[k - 1] > r:
            rows[k] = rows[k - 1]
            k -= 1
        rows[k] = r
    for t in range(f):
        r = rows[t]
        copy(V[t], A[r] if r < m else G[r - m], n)
    whiten(pool.L, n, V, 0, f)
    for t in range(f):
        times(V, t + 1, V[t], n, R[t])
        diagonal[t] = R[t, t]
    return cholesky(R, 0, f, DEPENDENT)


@subroutine
def all_slacks(program, x, slack):
    """slack = c - C x."""
    A, G, c = program.A, program.G, program.c
    m, n = A.shape
    times(A, m, x, n, slack)
    times(G, G.shape[0], x, n, slack[m:])
    for r in range(c.size):
        slack[r] = c[r] - slack[r]


@subroutine
def at_rows(program, start, pool, working, f, scratch):
    """The minimiser at rows[:f]: ``scratch.y``, its multipliers, and ``scratch.slack``, all slacks."""
    _multipliers(start, working, f, scratch.y)
    if pool.shared:
        _slacks_by_pool(start, pool, working, f, scratch.y, scratch.slack)
    else:
        _minimiser(start, pool, working, f, scratch.y, scratch.x)
        all_slacks(program, scratch.x, scratch.slack)


@subroutine
def _multipliers(start, working, f, y):
    """S y = -s0 at rows[:f], s0 the slacks at the start."""
    slack, R, rows = start.slack, working.R, working.rows
    for t in range(f):
        y[t] = -slack[rows[t]]
    down(R, f, y)
    up(R, f, y)


@subroutine
def _slacks_by_pool(start, pool, working, f, y, slack):
    """slack = s0 + S y, where the pool holds all rows."""
    S, rows = pool.S, working.rows
    copy(slack, start.slack, slack.size)
    for t in range(f):
        add(slack, y[t], S[rows[t]], slack.size)


@subroutine
def _minimiser(start, pool, working, f, y, x):
    """x = x0 - Q^-1 C'y."""
    L, V, slot, rows, n = pool.L, pool.V, pool.slot, working.rows, x.size
    clear(x, n)
    for t in range(f):
        add(x, -y[t], V[slot[rows[t]]], n)
    up(L, n, x)
    add(x, 1.0, start.x, n)
