"""solve_qp by compiled code: one call for the forward pass of a whole batch, and one for the backward pass.

Three hundred small torch operations take 2 ms, whatever the size of the problem; here a problem of ten variables takes
a few microseconds. ``solve.py`` answers what it can certify. All other problems of a batch (no solution, singular Q,
dependent rows) are solved by the general path, ``_active_set``. ``Found`` holds the answers of both.

Second derivatives and cotangents under vmap are those of :class:`newton_plugin.convex._system.kkt.KKTSolve`, with the
same factors. Under ``torch.func`` transforms the solver takes the general path for all problems.

Compiling takes some twenty seconds, once: numba keeps the machine code beside these files (or, where that folder
cannot be written, in the user's cache folder) and later processes load it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from newton_plugin._runtime.compiler import untraced
from newton_plugin.convex._active_set.solve import solve_active_set
from newton_plugin.convex._compiled.solve import solve
from newton_plugin.convex._status import report_failures, warn_not_unique
from newton_plugin.convex._system.factors import Factors, put
from newton_plugin.convex._system.kkt import KKTSolve, kkt_apply
from newton_plugin.convex._system.problem import Problem
from newton_plugin.convex._system.standard_form import standard_form
from newton_plugin.convex._system.transforms import under_transform

__all__ = ["CompiledQP", "Found", "compiled_active_rows", "find"]


@dataclasses.dataclass
class Found:
    """B solutions and factored optimality systems; matrices without a batch dimension are shared."""

    x: Tensor
    """(B, n), 0 where there is none."""
    y: Tensor
    """(B, K), the multipliers of the rows of A and G."""
    active: Tensor
    """(B, K)."""
    status: Tensor
    """(B,)."""
    cholesky: Tensor
    """L of Q, (B, n, n) or (1, n, n); its lower triangle."""
    schur: Tensor
    """R, (B, w, w); its lower triangle up to the number of working rows."""
    working: Tensor
    """(B, w), the working rows; of each problem the first f count."""
    report: Tensor
    """(B, 3): f, steps of refinement, and whether the three fields above are valid."""
    rest: tuple[Tensor, Problem, Factors] | None = None
    """Batch indices, standard form and factors of the problems that the general path solved."""

    def factors(self, shared: bool) -> Factors:
        """All systems in the form of the general path; ``shared``: Q is."""
        batch, n = self.x.shape
        count = self.report[:, 0]
        f = int(count.max())
        present = torch.arange(f) < count.unsqueeze(-1)
        both = present.unsqueeze(-1) & present.unsqueeze(-2)
        L = self.cholesky.tril()
        factors = Factors(
            L[0] if shared else L,
            torch.where(present, self.working[:, :f], 0),
            present,
            torch.where(both, self.schur[:, :f, :f].tril(), torch.eye(f, dtype=L.dtype)),
            L.new_zeros(batch, 0, 0),
            torch.zeros(batch, dtype=torch.bool),
            self.report[:, 1],
        )
        if self.rest is None:
            return factors
        index, _, part = self.rest
        # Leave the standard form: drop its added variable, if there is one, and its empty rows.
        size = part.inverse.shape[-1]
        kept = [i for i in range(size) if i < n or i >= part.cholesky.shape[-1]]
        part = part._replace(
            cholesky=part.cholesky[..., :n, :n],
            rows=part.rows * part.present,
            inverse=part.inverse[:, kept][:, :, kept],
        )
        if not shared:
            factors = factors._replace(cholesky=L.index_copy(0, index, part.cholesky.expand(len(index), n, n)))
        return put(factors, index, part)


def find(
    data: tuple[Tensor, ...], batch: int, refine: bool | str, on_failure: str, shape: tuple[int, ...], precision: float
) -> Found | None:
    """Q, p, A, b, G, h, each with a batch dimension or without -> the solutions; None if no problem is certified."""
    data = tuple(t.detach() for t in data)
    found = _run(data, batch, refine)
    certified = found.report.numpy()[:, 2]
    if certified.all():
        return found
    if not certified.any():
        return None
    index = torch.from_numpy((certified == 0).nonzero()[0])
    part = [t[index] if t.ndim == d + 1 else t for t, d in zip(data, (2, 1, 2, 1, 2, 1), strict=True)]
    Q, p, C, c = standard_form(*part, torch.Size((len(index),)))  # type: ignore[arg-type]
    problem = Problem(Q, p, C, c, data[3].shape[-1])
    solved = solve_active_set(problem, refine, precision=precision)
    found.status[index] = solved.status
    report_failures(found.status, on_failure, shape)
    if not bool(solved.unique.all()):
        several = torch.zeros(batch, dtype=torch.bool)
        several[index] = ~solved.unique & (solved.status == 0)
        warn_not_unique(several, shape)
    n, count = found.x.shape[1], found.y.shape[1]
    failed = (solved.status != 0).unsqueeze(-1)
    found.x[index] = solved.x[:, :n].masked_fill(failed, 0.0)
    found.y[index] = solved.y[:, :count].masked_fill(failed, 0.0)
    found.active[index] = solved.active[:, :count]
    found.rest = (index, problem, solved.factors)
    return found


def _run(data: tuple[Tensor, ...], batch: int, refine: bool | str) -> Found:
    Q, p, A, b, G, h = (
        t if t.is_contiguous() else t.contiguous()
        for t in (t if t.ndim > d else t.unsqueeze(0) for t, d in zip(data, (2, 1, 2, 1, 2, 1), strict=True))
    )
    n, count = p.shape[-1], b.shape[-1] + h.shape[-1]
    width = min(n, count)
    found = Found(
        torch.zeros(batch, n, dtype=torch.float64),
        torch.zeros(batch, count, dtype=torch.float64),
        torch.empty(batch, count, dtype=torch.bool),
        torch.zeros(batch, dtype=torch.long),
        torch.empty(len(Q), n, n, dtype=torch.float64),
        torch.empty(batch, width, width, dtype=torch.float64),
        torch.empty(batch, width, dtype=torch.long),
        torch.empty(batch, 3, dtype=torch.long),
    )
    adaptive, shared = refine == "auto", batch > 1 and len(Q) == len(A) == len(G) == 1
    start = 0 if adaptive else int(bool(refine))
    out = (found.x, found.y, found.active, found.cholesky, found.schur, found.working, found.report)
    solve(*(t.numpy() for t in (Q, p, A, b, G, h)), start, adaptive, shared, *(t.numpy() for t in out))
    return found


def compiled_active_rows(problem: Problem) -> Tensor:
    """Working rows (B, K) of problems in standard form; the equalities alone where a problem is not certified."""
    m, C, c = problem.m, problem.C, problem.c
    data = (problem.Q, problem.p, C[..., :m, :], c[:, :m], C[..., m:, :], c[:, m:])
    active = _run(tuple(t.cpu() for t in data), problem.batch, "auto").active
    return active.to(problem.p.device) | problem.is_equality


@untraced
class CompiledQP(torch.autograd.Function):
    """Q, p, A, b, G, h, found -> x, y as in ``found``, differentiable to any order."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        Q, p, A, b, G, h, found = args
        ctx.set_materialize_grads(False)
        ctx.vectors, ctx.rest, ctx.status = (p.ndim, b.ndim, h.ndim), found.rest, found.status
        ctx.save_for_backward(Q, A, G, found.x, found.y, found.cholesky, found.schur, found.working, found.report)
        return found.x, found.y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        Q, A, G, x, y, *factors = ctx.saved_tensors
        gx = torch.zeros_like(x) if grads[0] is None else grads[0]
        gy = torch.zeros_like(y) if grads[1] is None else grads[1]
        found = Found(x, y, y, ctx.status, *factors, rest=ctx.rest)
        if torch.is_grad_enabled() or under_transform():
            return _by_torch(Q, A, G, x, y, gx, gy, found, ctx.vectors)
        return _by_kernel(Q, A, G, x, y, gx, gy, found, ctx.vectors, ctx.needs_input_grad)


def _by_kernel(
    Q: Tensor,
    A: Tensor,
    G: Tensor,
    x: Tensor,
    y: Tensor,
    gx: Tensor,
    gy: Tensor,
    found: Found,
    vectors: tuple[int, int, int],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    from newton_plugin.convex._compiled.adjoint import adjoint  # compiled or loaded where a gradient is asked for

    batch, m = len(x), A.shape[-2]
    vx, vy = torch.empty_like(x), torch.empty_like(y)
    if found.rest is not None:
        index, problem, factors = found.rest
        wide = torch.nn.functional.pad
        rx = wide(gx[index], (0, problem.p.shape[1] - x.shape[1]))
        ry = wide(gy[index], (0, problem.c.shape[1] - y.shape[1]))
        ux, uy = kkt_apply(problem.Q, problem.C, rx.unsqueeze(-1), ry.unsqueeze(-1), factors)
        failed = (found.status[index] != 0).unsqueeze(-1)
        vx[index] = ux.squeeze(-1)[:, : x.shape[1]].masked_fill(failed, 0.0)
        vy[index] = uy.squeeze(-1)[:, : y.shape[1]].masked_fill(failed, 0.0)
    # The kernel writes gradients of matrices that each problem owns; of a shared one it is a product over the batch.
    matrices = (Q, A, G)
    own = [need and (t.ndim == 3 or batch == 1) for t, need in zip(matrices, needed[:5:2], strict=True)]
    written = [
        x.new_empty(batch, *t.shape[-2:]) if mine else x.new_empty(0, 1, 1)
        for t, mine in zip(matrices, own, strict=True)
    ]
    inputs = [t.detach() for t in (*matrices, x, y, gx, gy)]
    Q0, A0, G0, x0, y0, gx0, gy0 = (t if t.is_contiguous() else t.contiguous() for t in inputs)
    Q0, A0, G0 = (t if t.ndim == 3 else t.unsqueeze(0) for t in (Q0, A0, G0))
    factors = (found.cholesky, found.schur, found.working, found.report)
    adjoint(*(t.numpy() for t in (Q0, A0, G0, *factors, x0, y0, gx0, gy0, vx, vy, *written)))
    dQ, dA, dG = (
        None if not mine else w if t.ndim == 3 else w[0] for t, w, mine in zip(matrices, written, own, strict=True)
    )
    if needed[0] and dQ is None:
        outer = vx.mT @ x
        dQ = -0.5 * (outer + outer.mT)
    if needed[2] and dA is None:
        dA = -(y[:, :m].mT @ vx + vy[:, :m].mT @ x)
    if needed[4] and dG is None:
        dG = -(y[:, m:].mT @ vx + vy[:, m:].mT @ x)
    dp, db, dh = (_as_given(t, d) for t, d in zip((-vx, vy[:, :m], vy[:, m:]), vectors, strict=True))
    return dQ, dp, dA, db, dG, dh, None


def _as_given(gradient: Tensor, ndim: int) -> Tensor:
    """(B, r) -> (B, r), or (r) for a vector that all problems share."""
    return gradient if ndim == 2 else gradient[0] if len(gradient) == 1 else gradient.sum(0)


def _by_torch(
    Q: Tensor,
    A: Tensor,
    G: Tensor,
    x: Tensor,
    y: Tensor,
    gx: Tensor,
    gy: Tensor,
    found: Found,
    vectors: tuple[int, int, int],
) -> tuple[Tensor | None, ...]:
    """The same gradients by differentiable operations."""
    m = A.shape[-2]
    vx, vy = KKTSolve.apply(
        Q,
        stacked(A, G),
        gx.unsqueeze(-1),
        gy.unsqueeze(-1),
        None,
        None,
        *found.factors(Q.ndim == 2),
    )
    vx, vy = vx.squeeze(-1), vy.squeeze(-1)

    def outer(a: Tensor, b: Tensor, matrix: Tensor) -> Tensor:
        return a.mT @ b if matrix.ndim == 2 else a.unsqueeze(-1) * b.unsqueeze(-2)

    half = outer(vx, x, Q)
    dA = -(outer(y[:, :m], vx, A) + outer(vy[:, :m], x, A))
    dG = -(outer(y[:, m:], vx, G) + outer(vy[:, m:], x, G))
    dp, db, dh = (_as_given(t, d) for t, d in zip((-vx, vy[:, :m], vy[:, m:]), vectors, strict=True))
    return -0.5 * (half + half.mT), dp, dA, db, dG, dh, None


def stacked(A: Tensor, G: Tensor) -> Tensor:
    """[A; G], shared if both are."""
    if A.ndim != G.ndim:
        batch = max(len(t) for t in (A, G) if t.ndim == 3)
        A, G = (t.expand(batch, *t.shape[-2:]) for t in (A, G))
    return torch.cat((A, G), -2)
