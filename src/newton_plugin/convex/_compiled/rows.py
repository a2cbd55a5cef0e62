r"""The rows that may be active: whitened, multiplied with each other, and factored; for one problem, compiled.

* Q = L L'. V = (L^-1 C')' and S = V V' = C Q^-1 C' hold the rows that were ever guessed active (the *pool*), each in
  its ``slot``, -1 for none. With Q, A and G shared by a batch they are made once, for all rows.
* R R' = S at the guessed rows F, in the order in which these entered. Rows that enter extend R; a row that leaves costs
  the rows behind it.
"""

from __future__ import annotations

from newton_plugin.convex._compiled.linear import add, cholesky, clear, copy, down, jit, times, up, whiten

__all__ = ["DEPENDENT", "all_slacks", "at_rows", "cholesky_of", "enter", "extend_rows", "fresh_rows"]

DEPENDENT = 1e-9  # as in _rows


@jit()
def cholesky_of(Q, L):
    """L of the symmetric part of Q; false where Q is not safely definite."""
    n = Q.shape[0]
    for i in range(n):
        for j in range(i + 1):
            L[i, j] = 0.5 * (Q[i, j] + Q[j, i])
    return cholesky(L, 0, n, 1e-14 * n)


@jit()
def enter(A, G, L, V, S, slot, new, w, held):
    """Put rows new[:w] into the pool, behind the ``held`` rows that are there."""
    n, m = A.shape[1], A.shape[0]
    for t in range(w):
        r = new[t]
        slot[r] = held + t
        copy(V[held + t], A[r] if r < m else G[r - m], n)
    whiten(L, n, V, held, held + w)
    for a in range(held, held + w):
        times(V, a + 1, V[a], n, S[a])
        for k in range(a):
            S[k, a] = S[a, k]


@jit()
def extend_rows(S, slot, R, rows, known, f):
    """R for rows[:f], of which the first ``known`` are there; false if the rows depend on each other."""
    for i in range(known, f):
        source = S[slot[rows[i]]]
        for j in range(i + 1):
            R[i, j] = source[slot[rows[j]]]
    return cholesky(R, known, f, DEPENDENT)


@jit()
def fresh_rows(A, G, L, V, R, rows, f, diagonal):
    """R for rows[:f] from the rows alone, in ascending order: the same bits however they were found.

    V is overwritten; ``diagonal`` receives that of S.
    """
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
    whiten(L, n, V, 0, f)
    for t in range(f):
        times(V, t + 1, V[t], n, R[t])
        diagonal[t] = R[t, t]
    return cholesky(R, 0, f, DEPENDENT)


@jit()
def all_slacks(A, G, c, x, s):
    """s = c - C x."""
    m, n = A.shape
    times(A, m, x, n, s)
    times(G, G.shape[0], x, n, s[m:])
    for r in range(c.size):
        s[r] = c[r] - s[r]


@jit()
def at_rows(A, G, c, L, V, S, slot, shared, R, rows, f, x0, s0, y, s, x):
    """The multipliers of rows[:f] and all slacks."""
    n, count = A.shape[1], c.size
    for t in range(f):
        y[t] = -s0[rows[t]]
    down(R, f, y)
    up(R, f, y)
    if shared:
        copy(s, s0, count)
        for t in range(f):
            add(s, y[t], S[rows[t]], count)
    else:
        clear(x, n)
        for t in range(f):
            add(x, -y[t], V[slot[rows[t]]], n)
        up(L, n, x)
        add(x, 1.0, x0, n)
        all_slacks(A, G, c, x, s)
