"""The backward pass of ``_compiled_solve``: one solve with the factors of the forward pass, and all six gradients.

With u = (x, y) the solution and v = K^-1 (dL/du) (``_kkt``)::

    dp = -v_x    d(b, h) = v_y    dQ = -(v_x x' + x v_x')/2    d[A; G] = -(y v_x' + v_y x')
"""

from __future__ import annotations

import numpy as np

from newton_plugin.convex._compiled.linear import clear, jit, solve_rows

__all__ = ["adjoint"]


@jit()
def _outer(out, a, b, c, d):
    """out = -(a b' + c d')."""
    for i in range(out.shape[0]):
        f, g, row = -a[i], -c[i], out[i]
        for j in range(row.size):
            row[j] = f * b[j] + g * d[j]


@jit(
    "void(float64[:,:,::1], float64[:,:,::1], float64[:,:,::1], float64[:,:,::1], float64[:,:,::1], int64[:,::1], "
    "int64[:,::1], float64[:,::1], float64[:,::1], float64[:,::1], float64[:,::1], float64[:,::1], float64[:,::1], "
    "float64[:,:,::1], float64[:,:,::1], float64[:,:,::1])"
)
def adjoint(Q, A, G, factor, schur, working, report, x, y, gx, gy, vx, vy, dQ, dA, dG):
    """v (B, n), (B, K) from dL/dx (B, n), dL/dy (B, K); dQ, dA and dG (B, ...) are written unless they are empty.

    Where ``report`` says that a problem was not certified, v is given.
    """
    batch, n = x.shape
    m = A.shape[1]
    count = y.shape[1]
    work = np.zeros((7, max(n, count, 1)))
    for e in range(batch):
        if report[e, 2]:
            f, steps = report[e, 0], report[e, 1]
            ry, uy = work[5], work[6]
            for t in range(f):
                ry[t] = gy[e, working[e, t]]
            Qe, Ae, Ge = Q[min(e, Q.shape[0] - 1)], A[min(e, A.shape[0] - 1)], G[min(e, G.shape[0] - 1)]
            L, rows = factor[min(e, factor.shape[0] - 1)], working[e]
            solve_rows(Qe, Ae, Ge, L, schur[e], rows, f, steps, gx[e], ry, vx[e], uy, work)
            clear(vy[e], count)
            for t in range(f):
                vy[e, working[e, t]] = uy[t]
        if dQ.shape[0]:
            half = work[5, :n]
            for i in range(n):
                half[i] = 0.5 * vx[e, i]
            _outer(dQ[e], half, x[e], x[e], half)
        if dA.shape[0]:
            _outer(dA[e], y[e, :m], vx[e], vy[e, :m], x[e])
        if dG.shape[0]:
            _outer(dG[e], y[e, m:], vx[e], vy[e, m:], x[e])
