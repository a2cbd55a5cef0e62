"""Dense linear algebra for one small problem, compiled by numba: the inner loops of all kernels.

Every loop is a scalar product of contiguous rows, four rows at a time where possible; the compiler turns these into
vector instructions. Measured on one core: a Cholesky factorisation takes 19 us at n = 100 and 106 us at n = 200, where
torch's takes 47 us and 158 us. Lengths are arguments, because slices of arrays take long to compile.

The compiler may reorder sums (``reassoc``), but it does so once for all problems: no bit depends on where a problem
stands in a batch. NaN and infinity keep their meaning.
"""

from __future__ import annotations

import math

import numpy as np

from newton_plugin.convex._compiled.jit import subroutine

__all__ = [
    "add",
    "cholesky",
    "clear",
    "copy",
    "count_up",
    "dot",
    "down",
    "negate",
    "norm",
    "norm_in",
    "norm_per",
    "times",
    "up",
    "whiten",
]


@subroutine
def dot(a, b, n):
    """a'b over the first n entries; n limits all functions below in the same way."""
    total = 0.0
    for i in range(n):
        total += a[i] * b[i]
    return total


@subroutine
def norm(a, n):
    return math.sqrt(dot(a, a, n))


@subroutine
def norm_in(unit, a, n):
    """The norm of the products unit_j a_j."""
    total = 0.0
    for i in range(n):
        scaled = unit[i] * a[i]
        total += scaled * scaled
    return math.sqrt(total)


@subroutine
def norm_per(unit, a, n):
    """The norm of the quotients a_j / unit_j."""
    total = 0.0
    for i in range(n):
        scaled = a[i] / unit[i]
        total += scaled * scaled
    return math.sqrt(total)


@subroutine
def copy(out, a, n):
    """out = a. (Assigning to a slice would also compile numba's error messages.)"""
    for i in range(n):
        out[i] = a[i]


@subroutine
def clear(out, n):
    """out = 0."""
    for i in range(n):
        out[i] = 0


@subroutine
def negate(out, a, n):
    """out = -a."""
    for i in range(n):
        out[i] = -a[i]


@subroutine
def count_up(out, n):
    """out = 0, 1, 2, ..."""
    for i in range(n):
        out[i] = i


@subroutine
def add(out, f, a, n):
    """out += f a."""
    for i in range(n):
        out[i] += f * a[i]


@subroutine
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


@subroutine
def down(L, n, v):
    """v <- L^-1 v."""
    for j in range(n):
        v[j] = (v[j] - dot(L[j], v, j)) / L[j, j]


@subroutine
def up(L, n, v):
    """v <- L'^-1 v."""
    for i in range(n - 1, -1, -1):
        v[i] /= L[i, i]
        add(v, -v[i], L[i], i)


@subroutine
def whiten(L, n, V, first, last):
    """v <- L^-1 v for the rows v of V[first:last], four at a time, so that L is read once for the four."""
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


@subroutine
def cholesky(L, first, last, tiny):
    """Extend a factor M = L L' by the rows first:last, in which L holds M up to the diagonal on entry.

    Returns False if a pivot is not larger than ``tiny`` times its diagonal entry.
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
