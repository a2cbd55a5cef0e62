"""Dense linear algebra for one small problem, compiled by numba: the loops below ``_compiled_solve`` and its adjoint.

Everything is a scalar product of contiguous rows, four at a time where that is possible, and the compiler makes vector
instructions of them. Measured on one core: a Cholesky factorisation takes 19 us at n = 100 and 106 us at n = 200, where
torch's takes 47 us and 158 us. (Lengths are arguments because slices of arrays take long to compile.)

Sums may be reordered by the compiler (``reassoc``), but in one way for all: no bit depends on where a problem stands in
a batch. NaN and infinity keep their meaning.
"""

from __future__ import annotations

import functools
import math
import zlib
from pathlib import Path
from typing import Any

import numba
import numpy as np

__all__ = ["add", "cholesky", "clear", "copy", "dot", "down", "jit", "norm", "solve_rows", "times", "up", "whiten"]


_njit: Any = numba.njit  # it has no types


def jit(*signature: Any) -> Any:
    """``numba.njit`` without the GIL, with reordered sums.

    With a signature it is compiled at once and kept on disk, without one it is compiled as a part of its callers.
    numba notices changes of the file of a function it has kept, not of the files of its parts: so the name carries a
    sum of them all.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
    if signature:

        def named(function: Any) -> Any:
            function.__qualname__ += f"_{_sources():08x}"
            return _njit(*signature, cache=True, **options)(function)

        return named
    return _njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **options)


@functools.cache
def _sources() -> int:
    files = sorted(Path(__file__).parent.glob("_compiled*.py"))
    return zlib.crc32(b"".join(file.read_bytes() for file in files))


@jit()
def dot(a, b, n):
    """Of the first n entries, as all that follow."""
    total = 0.0
    for i in range(n):
        total += a[i] * b[i]
    return total


@jit()
def norm(a, n):
    return math.sqrt(dot(a, a, n))


@jit()
def copy(out, a, n):
    """out = a. (A slice on the left would compile numba's error messages with it.)"""
    for i in range(n):
        out[i] = a[i]


@jit()
def clear(out, n):
    """out = 0."""
    for i in range(n):
        out[i] = 0


@jit()
def add(out, f, a, n):
    """out += f a."""
    for i in range(n):
        out[i] += f * a[i]


@jit()
def times(M, rows, v, n, out):
    """out = M v, for the first rows of M."""
    i = 0
    while i + 4 <= rows:
        r0, r1, r2, r3 = M[i], M[i + 1], M[i + 2], M[i + 3]
        s0 = s1 = s2 = s3 = 0.0
        for j in range(n):
            s0 += r0[j] * v[j]
            s1 += r1[j] * v[j]
            s2 += r2[j] * v[j]
            s3 += r3[j] * v[j]
        out[i], out[i + 1], out[i + 2], out[i + 3] = s0, s1, s2, s3
        i += 4
    while i < rows:
        out[i] = dot(M[i], v, n)
        i += 1


@jit()
def down(L, n, v):
    """v <- L^-1 v."""
    for j in range(n):
        v[j] = (v[j] - dot(L[j], v, j)) / L[j, j]


@jit()
def up(L, n, v):
    """v <- L'^-1 v."""
    for i in range(n - 1, -1, -1):
        v[i] /= L[i, i]
        add(v, -v[i], L[i], i)


@jit()
def whiten(L, n, V, first, last):
    """v <- L^-1 v for the rows v of V[first:last]: four at a time, as L is read once for them."""
    r = first
    while r + 4 <= last:
        v0, v1, v2, v3 = V[r], V[r + 1], V[r + 2], V[r + 3]
        for j in range(n):
            row = L[j]
            s0 = s1 = s2 = s3 = 0.0
            for i in range(j):
                s0 += row[i] * v0[i]
                s1 += row[i] * v1[i]
                s2 += row[i] * v2[i]
                s3 += row[i] * v3[i]
            scale = 1.0 / row[j]
            v0[j] = (v0[j] - s0) * scale
            v1[j] = (v1[j] - s1) * scale
            v2[j] = (v2[j] - s2) * scale
            v3[j] = (v3[j] - s3) * scale
        r += 4
    while r < last:
        down(L, n, V[r])
        r += 1


@jit()
def cholesky(L, first, last, tiny):
    """More rows for a factor M = L L': the rows of L from ``first`` on hold those of M up to the diagonal.

    False if a pivot is not larger than ``tiny`` times the diagonal entry.
    """
    start = first
    while start < last:
        stop = min(start + 4, last)
        whiten(L, start, L, start, stop)
        for i in range(start, stop):
            for j in range(start, i):
                L[i, j] = (L[i, j] - dot(L[i], L[j], j)) / L[j, j]
            size = L[i, i]
            pivot = size - dot(L[i], L[i], i)
            if not (pivot > tiny * size and pivot < np.inf):
                return False
            L[i, i] = math.sqrt(pivot)
        start = stop
    return True


@jit()
def _once(A, G, L, R, rows, f, rx, ry, ux, uy, t, n):
    """As ``_kkt``: y = S^-1 (C Q^-1 rx - ry), x = Q^-1 (rx - C'y), over the working rows."""
    m = A.shape[0]
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


@jit()
def solve_rows(Q, A, G, L, R, rows, f, steps, rx, ry, ux, uy, work):
    """``K (ux, uy) = (rx, ry)`` at f working rows, Q = L L' and S = R R', with ``steps`` of iterative refinement.

    ``work``: five rows, of at least max(n, f) entries each.
    """
    n, m = Q.shape[0], A.shape[0]
    t, ax, ay, dx, dy = work[0], work[1], work[2], work[3], work[4]
    for step in range(steps + 1):
        if step == 0:
            copy(ax, rx, n)
            copy(ay, ry, f)
            clear(ux, n)
            clear(uy, f)
        else:
            copy(ax, rx, n)
            for i in range(n):  # only the symmetric part of Q counts
                ax[i] -= 0.5 * dot(Q[i], ux, n)
                add(ax, -0.5 * ux[i], Q[i], n)
            for i in range(f):
                r = rows[i]
                row = A[r] if r < m else G[r - m]
                ay[i] = ry[i] - dot(row, ux, n)
                add(ax, -uy[i], row, n)
        _once(A, G, L, R, rows, f, ax, ay, dx, dy, t, n)
        add(ux, 1.0, dx, n)
        add(uy, 1.0, dy, f)
