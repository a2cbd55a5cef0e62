r"""The optimality system of a QP at its active constraints, solved and differentiated to any order.

With the working rows W (the equalities and the active inequalities) of C = [A; G] the solution of a QP solves
the *linear* system

    [ Q    C_W' ] [ x   ]   [ -p  ]
    [ C_W  0    ] [ y_W ] = [ c_W ]

so its derivatives are those of a linear solve ``u = K^-1 r``. With the adjoint ``v = K^-1 (dL/du)``, and K symmetric::

    dL/dr = v        dL/dQ = -(v_x x' + x v_x')/2        dL/dC = -(y v_x' + v_y x')

With z = -v_x, w = -v_y and r = (-p, c) this is the backward pass of BPQP (Pan et al., NeurIPS 2024): z solves
the equality-constrained QP min 1/2 z'Qz + g'z, C_W z = 0. One :class:`torch.autograd.Function` calls itself in
its backward and forward mode, so double backward and every composition of ``torch.func`` follow.

**How K is solved.** With Q = L L' and S = C_W Q^-1 C_W' = R R' (the solver has factored both)::

    y_W = S^-1 (C_W Q^-1 r_x - r_y)        x = Q^-1 (r_x - C_W' y_W)

Where Q is singular (a linear program) or rows of C_W depend on each other, the pseudo-inverse of K is used instead,
for these problems only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_plugin._runtime.compiler import untraced
from newton_plugin.convex._system.factors import Factors
from newton_plugin.convex._system.products import cholesky_apply, times, times_transposed
from newton_plugin.convex._system.transforms import flatten_mapped, refuse_nested_forward

__all__ = [
    "KKTSolve",
    "kkt_apply",
]


def _scatter(values: Tensor, factors: Factors, count: int) -> Tensor:
    """(B, f, r) at the working rows -> (B, K, r)."""
    out = values.new_zeros(values.shape[0], count, values.shape[2])
    return out.scatter_add_(1, factors.rows.unsqueeze(-1).expand_as(values), values)


def _gather(values: Tensor, factors: Factors) -> Tensor:
    """(B, K, r) -> (B, f, r), zero where there is no row."""
    index = factors.rows.unsqueeze(-1).expand(-1, -1, values.shape[2])
    return values.gather(1, index) * factors.present.unsqueeze(-1)


def _once(C: Tensor, rx: Tensor, ry: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """K^-1 (rx, ry) without refinement."""
    n, count = rx.shape[1], ry.shape[1]
    if factors.rows.shape[1] == 0:
        ux, uy = cholesky_apply(factors.cholesky, rx), torch.zeros_like(ry)
    else:
        t = cholesky_apply(factors.cholesky, rx)
        uw = torch.cholesky_solve(_gather(times(C, t) - ry, factors), factors.schur)
        uy = _scatter(uw * factors.present.unsqueeze(-1), factors, count)
        ux = cholesky_apply(factors.cholesky, rx - times_transposed(C, uy))
    if factors.inverse.shape[-1]:
        u = factors.inverse @ torch.cat((rx, _gather(ry, factors)), 1)
        chosen = factors.singular[:, None, None]
        ux = torch.where(chosen, u[:, :n], ux)
        uy = torch.where(chosen, _scatter(u[:, n:] * factors.present.unsqueeze(-1), factors, count), uy)
    return ux, uy


def kkt_apply(Q: Tensor, C: Tensor, rx: Tensor, ry: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """``K^-1 (rx, ry)``: rx (B, n, r), ry (B, K, r) -> the same shapes. Only the working rows of ry count.

    Each step of refinement solves for the residual, which is computed from Q and C and not from their factors.
    """
    ux, uy = _once(C, rx, ry, factors)
    for step in range(int(factors.refined.max()) if factors.refined.numel() else 0):
        residual_x = rx - 0.5 * (times(Q, ux) + times_transposed(Q, ux)) - times_transposed(C, uy)
        dx, dy = _once(C, residual_x, ry - times(C, ux), factors)
        wanted = (factors.refined > step)[:, None, None]
        ux, uy = torch.where(wanted, ux + dx, ux), torch.where(wanted, uy + dy, uy)
    return ux, uy


@untraced
class KKTSolve(torch.autograd.Function):
    """``u = K^-1 r`` with derivatives in Q, C and r, in both modes, of any order.

    Arguments: Q (n, n) or (B, n, n), C (K, n) or (B, K, n); rx and ry as in :func:`kkt_apply`; the two parts of u
    where the caller knows it already (the solver does), else None twice; and the fields of ``Factors``.
    """

    @staticmethod
    def forward(Q: Tensor, C: Tensor, rx: Tensor, ry: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        known_x, known_y, *factors = rest
        if known_x is not None:
            return known_x.clone(), known_y.clone()
        return kkt_apply(Q, C, rx, ry, Factors(*factors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        Q, C, _, _, _, _, *factors = inputs
        ctx.save_for_backward(Q, C, *output, *factors)
        ctx.save_for_forward(Q, C, *output, *factors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        Q, C, ux, uy, *factors = ctx.saved_tensors
        vx, vy = KKTSolve.apply(Q, C, grads[0], grads[1], None, None, *factors)
        dQ = dC = None
        if ctx.needs_input_grad[0]:
            if Q.ndim == 2:
                outer = _columns(vx).mT @ _columns(ux)
                dQ = -0.5 * (outer + outer.mT)
            else:
                half = -0.5 * vx
                dQ = _outer(half, ux, ux, half)
        if ctx.needs_input_grad[1]:
            if C.ndim == 2:
                left, right = torch.cat((uy, vy), -1), torch.cat((vx, ux), -1)
                dC = -(_columns(left).mT @ _columns(right))
            else:
                dC = _outer(-uy, vx, -vy, ux)
        return (dQ, dC, vx, vy, *(None,) * (2 + len(factors)))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        refuse_nested_forward()
        Q, C, ux, uy, *factors = ctx.saved_tensors
        tQ, tC, tx, ty = tangents[:4]
        rx = torch.zeros_like(ux) if tx is None else tx
        ry = torch.zeros_like(uy) if ty is None else ty
        if tQ is not None:
            rx = rx - 0.5 * ((tQ + tQ.mT) @ ux)
        if tC is not None:
            rx = rx - tC.mT @ uy
            ry = ry - tC @ ux
        return KKTSolve.apply(Q, C, rx, ry, None, None, *factors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        if all(d is None for i, d in enumerate(in_dims) if i not in (2, 3)):
            # Only right-hand sides are mapped: they become more columns of the same systems.
            columns = [_stack_columns(value, dim, size) for value, dim in zip(args[2:4], in_dims[2:4], strict=True)]
            out = KKTSolve.apply(*args[:2], *columns, *args[4:])
            return tuple(u.unflatten(-1, (size, -1)).movedim(-2, 0) for u in out), (0, 0)
        batch = args[2].shape[0] if in_dims[2] is None else args[2].movedim(in_dims[2], 0).shape[1]
        flat = [
            flatten_mapped(value, dim, size, batch, 2 if i in (0, 1, 6) else None)
            for i, (value, dim) in enumerate(zip(args, in_dims, strict=True))
        ]
        out = KKTSolve.apply(*flat)
        return tuple(u.unflatten(0, (size, batch)) for u in out), (0, 0)


def _outer(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """``a b' + c d'``. Single columns are multiplied entry by entry, which is faster than a batched matrix product."""
    if a.shape[-1] == 1:
        return torch.addcmul(a * b.mT, c, d.mT)
    return a @ b.mT + c @ d.mT


def _columns(vectors: Tensor) -> Tensor:
    """(B, n, r) -> (B r, n), for sums over the batch."""
    return vectors.mT.reshape(-1, vectors.shape[1])


def _stack_columns(value: Tensor, dim: int | None, size: int) -> Tensor:
    """(B, n, r), mapped over ``dim`` -> (B, n, size r)."""
    value = value.unsqueeze(0).expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
    return value.movedim(0, -2).flatten(-2)
