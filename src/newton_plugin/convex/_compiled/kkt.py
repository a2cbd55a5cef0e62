"""The optimality system at the working rows of one problem, solved by the factors of Q and S; compiled.

The formulas are those of ``_system/kkt.py``::

    y = S^-1 (C Q^-1 rx - ry)        x = Q^-1 (rx - C'y)        Q = L L',  S = C Q^-1 C' = R R'
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from newton_plugin.convex._compiled.jit import subroutine
from newton_plugin.convex._compiled.linear import add, clear, copy, dot, down, up

__all__ = ["System", "solve_system"]


class System(NamedTuple):
    """K = [Q, C'; C, 0] of one problem, where the rows of C are ``rows[:f]`` of [A; G]; f is passed separately."""

    Q: np.ndarray
    """(n, n); only its symmetric part counts."""
    A: np.ndarray
    """(m, n)."""
    G: np.ndarray
    """(k, n)."""
    L: np.ndarray
    """(n, n), the Cholesky factor of Q."""
    R: np.ndarray
    """(w, w), the Cholesky factor of S; (f, f) of it counts."""
    rows: np.ndarray
    """(w,), indices of rows of [A; G]."""


@subroutine
def solve_system(system, f, steps, rx, ry, ux, uy, work):
    """``K (ux, uy) = (rx, ry)`` at f working rows, with ``steps`` of iterative refinement.

    ``work``: five rows, of at least max(n, f) entries each.
    """
    n = rx.size
    t, ax, ay, dx, dy = work[0], work[1], work[2], work[3], work[4]
    copy(ax, rx, n)
    copy(ay, ry, f)
    clear(ux, n)
    clear(uy, f)
    for step in range(steps + 1):
        if step > 0:
            _residual(system, f, rx, ry, ux, uy, ax, ay)
        _solve_once(system, f, ax, ay, dx, dy, t)
        add(ux, 1.0, dx, n)
        add(uy, 1.0, dy, f)


@subroutine
def _residual(system, f, rx, ry, ux, uy, ax, ay):
    """(ax, ay) = (rx, ry) - K (ux, uy), from Q and C themselves."""
    Q, A, G, rows = system.Q, system.A, system.G, system.rows
    n, m = Q.shape[0], A.shape[0]
    copy(ax, rx, n)
    for i in range(n):  # only the symmetric part of Q counts
        ax[i] -= 0.5 * dot(Q[i], ux, n)
        add(ax, -0.5 * ux[i], Q[i], n)
    for i in range(f):
        r = rows[i]
        row = A[r] if r < m else G[r - m]
        ay[i] = ry[i] - dot(row, ux, n)
        add(ax, -uy[i], row, n)


@subroutine
def _solve_once(system, f, rx, ry, ux, uy, t):
    """The same without refinement; ``t`` (n) is overwritten."""
    A, G, L, R, rows = system.A, system.G, system.L, system.R, system.rows
    n, m = L.shape[0], A.shape[0]
    copy(t, rx, n)
    down(L, n, t)
    up(L, n, t)
    for i in range(f):
        r = rows[i]
        row = A[r] if r < m else G[r - m]
        uy[i] = dot(row, t, n) - ry[i]
    down(R, f, uy)
    up(R, f, uy)
    copy(ux, rx, n)
    for i in range(f):
        r = rows[i]
        row = A[r] if r < m else G[r - m]
        add(ux, -uy[i], row, n)
    down(L, n, ux)
    up(L, n, ux)
