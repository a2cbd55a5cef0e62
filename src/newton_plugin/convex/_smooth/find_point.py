"""The step of a ConvexLayer that is not differentiated: solve, polish, check, and invert the optimality system."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from newton_plugin._errors import ArgumentTypeError, ShapeError
from newton_plugin._runtime.compiler import untraced
from newton_plugin.convex._smooth.interior_point import interior_point
from newton_plugin.convex._smooth.polish import Answer, polish
from newton_plugin.convex._smooth.program import Program
from newton_plugin.convex._status import Status, report_failures, warn_not_unique
from newton_plugin.convex._system.transforms import flatten_mapped

__all__ = ["FindPoint", "Request"]

_REMEDY = {
    Status.INFEASIBLE: "relax inequality(x, theta) <= 0, or check its signs",
    Status.UNBOUNDED: "add bounds by inequality=, or a quadratic term to the objective",
    Status.NON_CONVEX: "the Hessian of the objective (or of an inequality in force) has a negative eigenvalue",
    Status.INCONSISTENT: "equality(x, theta) = 0 has no solution: remove the contradicting rows",
    Status.NOT_CONVERGED: "scale the problem, give start= near the solution, or another solver=",
    Status.NOT_FINITE: "objective, equality or inequality, or a derivative of theirs, is NaN or infinite at the start: "
    "give start= inside their domain, or look for a NaN in theta",
}


class Settings(Protocol):
    """The options of a ConvexLayer that are used here."""

    variables: int
    solver: Callable[[Any], Any] | None
    start: Tensor | None
    on_failure: str


@dataclasses.dataclass(frozen=True)
class Request:
    layer: Settings
    program: Program
    dims: tuple[int | None, ...]
    """Batch dimension of each leaf: None or 0."""
    shape: tuple[int, ...] = ()


@untraced
class FindPoint(torch.autograd.Function):
    """theta -> u, a tensor of length m, active, K^-1, status; none of these is differentiable."""

    @staticmethod
    def forward(request: Request, *leaves: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        leaves = tuple(leaf.detach() for leaf in leaves)
        batch = 1
        for leaf, dim in zip(leaves, request.dims, strict=True):
            if dim is not None:
                batch = leaf.shape[0]
        out = _find(request, leaves, batch)
        return out if request.shape else tuple(value[0] for value in out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)
        ctx.count = len(inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, ...]:
        return (None,) * ctx.count

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[None, ...]:
        return (None,) * 5

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        request: Request = args[0]
        size = info.batch_size
        batch = request.shape[0] if request.shape else 1
        flat: list[Tensor] = []
        dims: list[int | None] = []
        for leaf, mapped, dim in zip(args[1:], in_dims[1:], request.dims, strict=True):
            if mapped is None and dim is None:
                flat.append(leaf)
                dims.append(None)
                continue
            if dim is None:  # mapped by this vmap, shared before
                leaf = leaf.movedim(mapped, 0)
                leaf = leaf.unsqueeze(1).expand(size, batch, *leaf.shape[1:]).flatten(0, 1)
            else:
                leaf = flatten_mapped(leaf, mapped, size, batch, None)
            flat.append(leaf)
            dims.append(0)
        new = dataclasses.replace(request, dims=tuple(dims), shape=(size * batch,))
        out = FindPoint.apply(new, *flat)
        if request.shape:
            out = tuple(value.unflatten(0, (size, batch)) for value in out)
        return out, (0,) * len(out)


def _find(request: Request, leaves: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    layer, program, dims = request.layer, request.program, request.dims
    n, device = layer.variables, leaves[0].device
    if layer.start is not None:
        start = layer.start.to(device, torch.float64)
    else:
        start = 0.1 * torch.cos(torch.arange(n, dtype=torch.float64, device=device))
    start = start.expand(batch, n)
    if layer.solver is None:
        point, status = interior_point(program, start, leaves, dims)
        kept = (status == 0).unsqueeze(-1)
        x, nu, lam, slack = (torch.where(kept, value, 1.0) for value in point)
        x = torch.where(kept, x, start)
    else:
        x, nu, lam = _ask(layer, program, leaves, dims, batch)
        slack = -program.values(x, leaves, dims)[2]
        status = torch.zeros(batch, dtype=torch.long, device=device)
    m = nu.shape[-1]
    answer = Answer(program, leaves, dims, (n, m), torch.cat((x, nu, lam), -1), slack, status)
    u, active, inverse, unique, status = polish(answer)[:5]
    if layer.on_failure != "nan":
        report_failures(status, layer.on_failure, request.shape, _REMEDY)
    if not bool((unique | (status != 0)).all()):
        warn_not_unique(~unique & (status == 0), request.shape, "a small quadratic term in the objective")
    good = (status == 0).unsqueeze(-1)
    u = torch.where(good, u, torch.cat((start, torch.ones_like(u[:, n:])), -1))
    inverse = torch.where(good.unsqueeze(-1), inverse, 0.0)
    return u, u.new_zeros(batch, m), active, inverse, status


def _ask(
    layer: Settings, program: Program, leaves: tuple[Tensor, ...], dims: tuple[int | None, ...], batch: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The user's solver, one theta after the other."""
    answers = []
    for i in range(batch):
        theta = pytree.tree_unflatten(
            [leaf if dim is None else leaf[i] for leaf, dim in zip(leaves, dims, strict=True)], program.spec
        )
        answer = layer.solver(theta)  # type: ignore[misc]
        if not (isinstance(answer, (tuple, list)) and len(answer) == 3):
            raise ArgumentTypeError(f"solver must return (x, nu, lam); got {type(answer).__name__}.")
        answers.append([torch.as_tensor(part, dtype=torch.float64, device=leaves[0].device) for part in answer])
    x, nu, lam = (torch.stack(parts) for parts in zip(*answers, strict=True))
    _, e, g = program.values(x, leaves, dims)
    if nu.shape != e.shape or lam.shape != g.shape:
        raise ShapeError(
            f"solver must return multipliers of the shapes {tuple(e.shape[1:])} and {tuple(g.shape[1:])}; "
            f"got {tuple(nu.shape[1:])} and {tuple(lam.shape[1:])}."
        )
    return x, nu, lam
