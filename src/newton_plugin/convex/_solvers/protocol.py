"""The protocol of a solver of quadratic programs: it says which rows are active."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from newton_plugin.convex._system.problem import Problem

__all__ = ["QPSolver", "Solver"]


@runtime_checkable
class QPSolver(Protocol):
    """Finds active rows.

    ``name`` appears as ``QPSolution.solver``. ``active_rows`` gets a :class:`Problem` of B problems in float64, without
    a graph. It returns a boolean (B, K), true where a row of C is active (the entries of equality rows are ignored), or
    None, which leaves the search to the built-in solver.
    """

    name: str

    def active_rows(self, problem: Problem) -> Tensor | None: ...


Solver = str | QPSolver | Callable[..., Any]
