"""The backward pass, compiled: one solve with the factors of the forward pass, and all six gradients.

With u = (x, y) the solution and v = K^-1 (dL/du) (``_system/kkt.py``)::

    dp = -v_x    d(b, h) = v_y    dQ = -(v_x x' + x v_x')/2    d[A; G] = -(y v_x' + v_y x')
"""

from __future__ import annotations

import numpy as np

from newton_plugin.convex._compiled.jit import kernel, subroutine
from newton_plugin.convex._compiled.kkt import System, solve_system
from newton_plugin.convex._compiled.linear import clear
from newton_plugin.convex._compiled.workspace import entry

__all__ = ["adjoint"]


@subroutine
def _outer(out, a, b, c, d):
    """out = -(a b' + c d')."""
    for i in range(out.shape[0]):
        f, g, row = -a[i], -c[i], out[i]
        for j in range(row.size):
            row[j] = f * b[j] + g * d[j]


@kernel(
    "void(float64[:,:,::1], float64[:,:,::1], float64[:,:,::1], float64[:,:,::1], float64[:,:,::1], int64[:,::1], "
    "int64[:,::1], float64[:,::1], float64[:,::1], float64[:,::1], float64[:,::1], float64[:,::1], float64[:,::1], "
    "float64[:,:,::1], float64[:,:,::1], float64[:,:,::1])"
)
def adjoint(Q, A, G, factor, schur, working, report, x, y, gx, gy, vx, vy, dQ, dA, dG):
    """v = (vx (B, n), vy (B, K)) from gx = dL/dx (B, n), gy = dL/dy (B, K).

    Q, A, G and ``factor`` have B entries or one. dQ, dA and dG (B, ...) are written unless they are empty. Where
    ``report`` says that a problem was not certified, v is an input.
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
            system = System(entry(Q, e), entry(A, e), entry(G, e), entry(factor, e), schur[e], working[e])
            solve_system(system, f, steps, gx[e], ry, vx[e], uy, work)
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
