"""The step of ``solve_qp`` that is not differentiated: find the active rows, and factor their system.

Everything that depends smoothly on the data comes from :class:`newton_plugin.convex._system.kkt.KKTSolve` afterwards.
This step is an autograd Function only so that the solver runs on plain tensors inside any transform (vmap, grad, jvp).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import ShapeError
from newton_plugin._runtime.compiler import untraced
from newton_plugin.convex._active_set.solve import solve_active_set
from newton_plugin.convex._solvers.choose import choose
from newton_plugin.convex._solvers.protocol import QPSolver, Solver
from newton_plugin.convex._status import report_failures, warn_not_unique
from newton_plugin.convex._system.problem import Problem
from newton_plugin.convex._system.transforms import flatten_mapped

__all__ = ["FindActiveSet", "Request"]


@dataclasses.dataclass
class Request:
    """What the caller asked for; after the solve also which solver was chosen."""

    n: int
    rows: int
    """Of A and G; the standard form may have one variable and some rows more."""
    m: int
    solver: Solver
    refine: bool | str
    on_failure: str
    shape: tuple[int, ...]
    """The shape of the batch, for messages."""
    precision: float
    """The rounding error of the caller's dtype."""
    chosen: list[str] = dataclasses.field(default_factory=list)


def _ask(solver: QPSolver, problem: Problem, request: Request) -> Tensor | None:
    """The active rows that the caller's own solver claims. It sees the variables and the rows that the caller gave."""
    n, rows = request.n, request.rows
    Q, p, C, c, m = problem
    claim = solver.active_rows(Problem(Q[..., :n, :n], p[:, :n], C[..., :rows, :n], c[:, :rows], m))
    if claim is None:
        return None
    if tuple(claim.shape) != (len(p), rows):
        raise ShapeError(
            f"active_rows of a solver must return None or a boolean tensor of shape {(len(p), rows)}, an entry for "
            f"each problem and row; {solver.name} returned shape {tuple(claim.shape)}."
        )
    return torch.nn.functional.pad(claim, (0, c.shape[-1] - rows))


@untraced
class FindActiveSet(torch.autograd.Function):
    """Q, p, C, c -> x, y, status, active, and the seven tensors of Factors; x and y are 0 where not solved."""

    @staticmethod
    def forward(Q: Tensor, p: Tensor, C: Tensor, c: Tensor, request: Request) -> tuple[Tensor, ...]:  # type: ignore[override]
        problem = Problem(Q.detach(), p.detach(), C.detach(), c.detach(), request.m)
        solver = choose(request.solver, problem)
        request.chosen[:] = [solver.name]
        claim = solver.active_rows(problem) if isinstance(request.solver, str) else _ask(solver, problem, request)
        solved = solve_active_set(problem, request.refine, claim, request.precision)
        failed = solved.status != 0
        report_failures(solved.status, request.on_failure, request.shape)
        if not bool(solved.unique.all()):
            warn_not_unique(~solved.unique & ~failed, request.shape)
        x = solved.x.masked_fill(failed.unsqueeze(-1), 0.0)
        y = solved.y.masked_fill(failed.unsqueeze(-1), 0.0)
        return x, y, solved.status, solved.active, *solved.factors

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, ...]:
        return (None,) * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[None, ...]:
        return (None,) * 11

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        batch = args[1].shape[0] if in_dims[1] is None else args[1].movedim(in_dims[1], 0).shape[1]
        flat = [
            flatten_mapped(value, dim, size, batch, 2 if i in (0, 2) else None)
            for i, (value, dim) in enumerate(zip(args[:4], in_dims[:4], strict=True))
        ]
        request = dataclasses.replace(args[4], shape=(size, *args[4].shape))
        out = FindActiveSet.apply(*flat, request)
        # The factor of a shared Q (out[4]) is the same for all.
        shared = [i == 4 and value.ndim == 2 for i, value in enumerate(out)]
        dims = tuple(None if alone else 0 for alone in shared)
        out = tuple(
            value if alone else value.unflatten(0, (size, batch)) for value, alone in zip(out, shared, strict=True)
        )
        return out, dims
