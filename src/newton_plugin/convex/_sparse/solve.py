"""Sparse quadratic programs: the same function of the data as for dense ones, through ``system.py``.

Q, A and G are sparse tensors (COO, CSR, CSC, BSR or BSC), shared by the batch. p, b and h may have batch dimensions,
which are solved in a loop. Backward and double backward are solves with the factors of the forward pass, and the
gradients of Q, A and G exist at the stored entries only. Second derivatives exist in p, b and h. In the entries of Q, A
and G they raise an error, because PyTorch's sparse tensors would drop them silently.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, NoGradientError, ShapeError
from newton_plugin._runtime.compiler import untraced
from newton_plugin.convex._solution import QPSolution
from newton_plugin.convex._sparse.system import SparseSystem
from newton_plugin.convex._status import Status, report_failures

__all__ = ["is_sparse", "solve_sparse"]

_LAYOUTS = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def is_sparse(tensor: Tensor | None) -> bool:
    """Whether it is a tensor in one of torch's sparse layouts: COO, CSR, CSC, BSR or BSC."""
    return isinstance(tensor, Tensor) and tensor.layout in _LAYOUTS


def solve_sparse(
    Q: Tensor,
    p: Tensor,
    A: Tensor | None,
    b: Tensor | None,
    G: Tensor | None,
    h: Tensor | None,
    *,
    solver: Any,
    reg: float,
    on_failure: str,
) -> QPSolution:
    """As :func:`solve_qp`, which has checked that arguments are complete and of the right type."""
    given = {name: t for name, t in zip("QpAbGh", (Q, p, A, b, G, h), strict=True) if isinstance(t, Tensor)}
    away = [f"{name} on {t.device}" for name, t in given.items() if t.device.type != "cpu"]
    if away:
        raise ArgumentError(f"sparse problems are solved on the CPU; got {', '.join(away)}. Move the data with .cpu().")
    n, m = p.shape[-1], 0 if b is None else b.shape[-1]
    k = 0 if h is None else h.shape[-1]
    dtype = p.dtype
    precision = max((torch.finfo(t.dtype).eps for t in (A, b, G, h) if t is not None), default=torch.finfo(dtype).eps)
    q_index, q_values = _entries("Q", Q, n, n)
    a_index, a_values = _entries("A", A, m, n)
    g_index, g_values = _entries("G", G, k, n)
    if reg:
        diagonal = torch.arange(n)
        q_index = torch.cat([q_index, torch.stack([diagonal, diagonal])], 1)
        q_values = torch.cat([q_values, torch.full((n,), float(reg), dtype=torch.float64)])
    c_index = torch.cat([a_index, g_index + torch.tensor([[m], [0]])], 1)
    c_values = torch.cat([a_values, g_values])
    empty = p.new_zeros(0, dtype=torch.float64)
    b, h = empty if b is None else b.double(), empty if h is None else h.double()
    shape = torch.broadcast_shapes(p.shape[:-1], b.shape[:-1], h.shape[:-1])
    wide = p.double().expand(*shape, n).reshape(shape.numel(), n)
    right = torch.cat((b.expand(*shape, m), h.expand(*shape, k)), -1).reshape(shape.numel(), m + k)
    xs, ys, statuses, actives, name = [], [], [], [], ""
    for pi, ci in zip(wide, right, strict=True):
        system = SparseSystem(q_index, c_index, n, m + k, m)
        status, name = system.find(q_values, pi, c_values, ci, solver, precision)
        if status == Status.SOLVED:
            kept = torch.where(system.working, ci, 0.0)
            x, y = SparseSolve.apply(q_values, c_values, -pi.unsqueeze(-1), kept.unsqueeze(-1), system)
            x, y = x.squeeze(-1), y.squeeze(-1)
        else:
            x, y = torch.full_like(pi, torch.nan), torch.full_like(ci, torch.nan)
        xs.append(x)
        ys.append(y)
        statuses.append(int(status))
        actives.append(system.working[m:])
    outcome = torch.tensor(statuses).reshape(shape)
    report_failures(outcome, on_failure, tuple(shape))
    x, y = torch.stack(xs).reshape(*shape, n).to(dtype), torch.stack(ys).reshape(*shape, m + k).to(dtype)
    active = torch.stack(actives).reshape(*shape, k)
    return QPSolution(x, y[..., :m], y[..., m:], outcome, active, solver=name, system=None)


def _entries(name: str, matrix: Tensor | None, rows: int, n: int) -> tuple[Tensor, Tensor]:
    """Indices (2, entries) and values in float64, differentiable."""
    if matrix is None:
        return torch.zeros(2, 0, dtype=torch.long), torch.zeros(0, dtype=torch.float64)
    if tuple(matrix.shape) != (rows, n):
        raise ShapeError(
            f"{name} must have shape ({rows}, {n}), without batch dimensions as others are sparse; "
            f"got {tuple(matrix.shape)}."
        )
    if matrix.layout == torch.strided:
        index = matrix.detach().nonzero().T
        return index, matrix[index[0], index[1]].double()
    matrix = (matrix if matrix.layout == torch.sparse_coo else matrix.to_sparse_coo()).coalesce()
    return matrix.indices(), _Once.apply(matrix.values().double())


@untraced
class _Once(torch.autograd.Function):
    """The identity, differentiable once: PyTorch (2.6 to 2.13) drops second derivatives of sparse tensors silently."""

    @staticmethod
    def forward(values: Tensor) -> Tensor:  # type: ignore[override]
        return values.view_as(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        if torch.is_grad_enabled():
            raise NoGradientError(
                "create_graph=True needs second derivatives in the entries of a sparse Q, A or G, which PyTorch's "
                "sparse tensors do not carry. Detach the matrix if only p, b and h vary, or give it dense."
            )
        return grads[0]


@untraced
class SparseSolve(torch.autograd.Function):
    """x, y = K^-1 (rx, ry), differentiable in the stored values of Q and C and in rx, ry; as ``KKTSolve``."""

    @staticmethod
    def forward(q: Tensor, c: Tensor, rx: Tensor, ry: Tensor, system: SparseSystem) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, y = system.solve(rx.detach().numpy(), ry.detach().numpy())
        return torch.from_numpy(x), torch.from_numpy(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, c, _, _, ctx.system = inputs
        ctx.save_for_backward(q, c, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q, c, x, y = ctx.saved_tensors
        vx, vy = SparseSolve.apply(q, c, *grads, ctx.system)
        (i, j), (r, k) = ctx.system.q_index, ctx.system.c_index
        dq = -0.5 * (vx[i] * x[j] + x[i] * vx[j]).sum(-1)
        dc = -(y[r] * vx[k] + vy[r] * x[k]).sum(-1)
        return dq, dc, vx, vy, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        q, c, rx, ry, system = args
        if in_dims[0] is not None or in_dims[1] is not None:
            raise ArgumentError("sparse Q, A and G cannot be mapped over by vmap. Loop over them, or use dense ones.")
        size, parts = info.batch_size, []
        for value, dim in ((rx, in_dims[2]), (ry, in_dims[3])):
            mapped = value.unsqueeze(0).expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
            parts.append(mapped.movedim(0, 1).reshape(mapped.shape[1], -1))
        out = SparseSolve.apply(q, c, *parts, system)
        return tuple(t.unflatten(1, (size, -1)).movedim(1, 0) for t in out), (0, 0)
