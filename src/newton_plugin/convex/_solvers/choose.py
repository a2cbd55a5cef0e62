"""The solver of a given name, and the choice that ``solver="auto"`` makes.

A solver only has to say which rows are active. Everything else is the work of ``_active_set``, the same for all
solvers: x and the multipliers to full accuracy, the check of the optimality conditions, statuses and derivatives. A
solver that stops early or is wrong costs time, never accuracy.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError
from newton_plugin.convex._solvers.active_rows import rows_from_duals
from newton_plugin.convex._solvers.external import EXTERNAL, ExternalSolver
from newton_plugin.convex._solvers.protocol import QPSolver, Solver
from newton_plugin.convex._status import MissingSolverError
from newton_plugin.convex._system.problem import Problem

__all__ = [
    "CallableSolver",
    "TorchSolver",
    "choose",
    "prefers_compiled",
]


class TorchSolver:
    """The built-in batched solver: block principal pivoting, then the dual active-set method where needed."""

    name = "torch"

    def active_rows(self, problem: Problem) -> Tensor | None:
        return None


class CompiledSolver:
    """The built-in solver compiled by numba, for calls in which ``_compiled`` cannot do the whole of ``solve_qp``."""

    name = "numba"

    def active_rows(self, problem: Problem) -> Tensor | None:
        if not _installed("numba"):
            raise MissingSolverError(
                'solver="numba" needs the package numba, which is not installed. Install it with: '
                'pip install "newton-plugin[convex]"; or use solver="torch", which needs nothing.'
            )
        from newton_plugin.convex._compiled.qp import compiled_active_rows

        return compiled_active_rows(problem)


class CallableSolver:
    """The user's own function ``(Q, p, A, b, G, h) -> (x, nu, lam)`` on B problems.

    Vectors come as (B, ...), matrices as (n, n) where shared and (B, n, n) where not; A, b, G, h may have no
    rows. Low accuracy is enough: only the active rows are read from the answer.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.name = getattr(fn, "__name__", type(fn).__name__)

    def active_rows(self, problem: Problem) -> Tensor:
        Q, p, C, c, m = problem
        h = c[:, m:].masked_fill(c[:, m:] >= 1e300, torch.inf)  # as given; the standard form has no infinity
        answer = self.fn(Q, p, C[..., :m, :], c[:, :m], C[..., m:, :], h)
        if not (isinstance(answer, (tuple, list)) and len(answer) == 3):
            raise ArgumentTypeError(
                f"solver must return (x, nu, lam); {self.name} returned {type(answer).__name__}. "
                "Each is a tensor with the batch dimension first."
            )
        x, _, lam = (torch.as_tensor(part, dtype=p.dtype, device=p.device) for part in answer)
        if x.shape != p.shape or lam.shape != c[:, m:].shape:
            raise ArgumentError(
                f"solver must return x of shape {tuple(p.shape)} and lam of shape {tuple(c[:, m:].shape)}; "
                f"{self.name} returned {tuple(x.shape)} and {tuple(lam.shape)}."
            )
        return rows_from_duals(problem, x, torch.nn.functional.pad(lam, (m, 0)))


def choose(solver: Solver, problem: Problem) -> QPSolver:
    """The solver of this name, for this problem."""
    if isinstance(solver, str):
        if solver == "numba" or (solver == "auto" and prefers_compiled(solver, problem.p)):
            return CompiledSolver()
        if solver == "auto":
            return ExternalSolver("daqp") if prefers_daqp(problem) else TorchSolver()
        if solver == "torch":
            return TorchSolver()
        if solver in EXTERNAL:
            return ExternalSolver(solver)
        names = ", ".join(repr(name) for name in ("auto", "numba", "torch", *EXTERNAL))
        raise ArgumentError(f"solver must be one of {names}, a QPSolver or a callable; got {solver!r}.")
    if isinstance(solver, QPSolver):
        return solver
    if callable(solver):
        return CallableSolver(solver)
    raise ArgumentTypeError(
        f"solver must be a name, a QPSolver or a callable (Q, p, A, b, G, h) -> (x, nu, lam); "
        f"got {type(solver).__name__}."
    )


def prefers_compiled(solver: Solver, p: Tensor) -> bool:
    """Whether to use the compiled solver: it is asked for, or ``"auto"``; and it is installed and fits the data."""
    return solver in ("auto", "numba") and p.device.type == "cpu" and p.dtype == torch.float64 and _installed("numba")


def prefers_daqp(problem: Problem) -> bool:
    """Whether DAQP is installed and, by measurement, faster than the torch solver."""
    return problem.p.device.type == "cpu" and problem.p.shape[1] <= 200 and _installed("daqp")


@functools.cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
