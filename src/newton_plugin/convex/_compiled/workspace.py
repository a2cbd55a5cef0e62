"""The arrays of one problem by name: what the kernels hand to each other.

Each NamedTuple is built once for a problem, by a kernel; subroutines borrow it (see ``jit.py``).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from newton_plugin.convex._compiled.jit import array_subroutine

__all__ = ["Pool", "Program", "Scratch", "Start", "WorkingRows", "entry", "make_scratch"]


class Program(NamedTuple):
    """One problem: minimise 1/2 x'Qx + p'x subject to A x = c[:m] and G x <= c[m:]; K = m + k rows."""

    Q: np.ndarray
    """(n, n)."""
    p: np.ndarray
    """(n,)."""
    A: np.ndarray
    """(m, n)."""
    G: np.ndarray
    """(k, n)."""
    c: np.ndarray
    """(K,)."""
    unit: np.ndarray
    """(n,), 1 / sqrt(Q_jj): the unit of each variable, so that Q has a diagonal of ones (``_system/units.py``)."""
    length: np.ndarray
    """(K,), the norms of the rows of [A; G] in these units."""


class Pool(NamedTuple):
    """The rows that were ever guessed active: whitened, and multiplied with each other."""

    L: np.ndarray
    """(n, n), Q = L L'."""
    V: np.ndarray
    """(K, n), whitened rows: V = (L^-1 C')'."""
    S: np.ndarray
    """(K, K), S = V V' = C Q^-1 C'."""
    slot: np.ndarray
    """(K,), where a row stands in V and S, or -1."""
    shared: bool
    """Whether the batch shares one pool: it then holds all rows, in order."""


class WorkingRows(NamedTuple):
    """The rows guessed active, and the factor of S at them; at most w = min(n, K), of which the first f count."""

    R: np.ndarray
    """(w, w), R R' = S at these rows."""
    rows: np.ndarray
    """(w,), in the order in which they entered."""
    inside: np.ndarray
    """(K,), 1 for a working row, 0 for another one."""


class Start(NamedTuple):
    """The minimiser without constraints, and what counts as zero."""

    x: np.ndarray
    """(n,)."""
    slack: np.ndarray
    """(K,), c - C x."""
    limit: np.ndarray
    """(K,): a row is violated where its slack is below -limit."""
    tolerance: float
    """A multiplier is negative below -tolerance times the scale of the gradient."""
    descent: float
    """|L^-1 p|, the scale of the gradient to begin with."""


class Scratch(NamedTuple):
    """Vectors that are overwritten in every problem."""

    x: np.ndarray
    """(n,), where ``at_rows`` leaves the minimiser."""
    y: np.ndarray
    """(K,), the multipliers of the working rows."""
    slack: np.ndarray
    """(K,)."""
    force: np.ndarray
    """(K,), the multipliers of the working rows times the lengths of their whitened rows."""
    new: np.ndarray
    """(K,) integers, rows that are about to enter."""
    rx: np.ndarray
    """(n,), right-hand side of the optimality system."""
    ry: np.ndarray
    """(K,), the same, in the working rows."""
    start_x: np.ndarray
    """(n,), the arrays of ``Start``."""
    start_slack: np.ndarray
    """(K,)."""
    limit: np.ndarray
    """(K,)."""
    work: np.ndarray
    """(5, max(n, K)), for ``solve_system``."""


@array_subroutine
def make_scratch(n, count):
    """Scratch vectors for n variables and ``count`` rows."""
    some = max(count, 1)
    return Scratch(
        np.empty(n),
        np.empty(some),
        np.empty(some),
        np.empty(some),
        np.empty(some, np.int64),
        np.empty(n),
        np.empty(some),
        np.empty(n),
        np.empty(some),
        np.empty(some),
        np.empty((5, max(n, some))),
    )


@array_subroutine
def entry(array, e):
    """Entry e, or the one that all problems share."""
    return array[min(e, array.shape[0] - 1)]
