"""The outcome of each problem, and the error or warning that the caller asked for where there is no solution."""

from __future__ import annotations

import enum
import warnings

import torch
from torch import Tensor

from newton_plugin._errors import NewtonPluginError

__all__ = [
    "MissingSolverError",
    "NestedForwardError",
    "NonUniqueSolutionWarning",
    "ProblemFailedError",
    "ProblemFailedWarning",
    "Status",
    "report_failures",
    "warn_not_unique",
]


class Status(enum.IntEnum):
    """The outcome of one problem; only ``SOLVED`` problems have a finite ``x``."""

    SOLVED = 0
    INFEASIBLE = 1
    """No x meets the constraints."""
    UNBOUNDED = 2
    """The objective falls without end along a feasible direction."""
    NON_CONVEX = 3
    """Q has a negative eigenvalue."""
    INCONSISTENT = 4
    """The equalities alone contradict each other."""
    NOT_CONVERGED = 5
    """The solver stopped, or its answer does not meet the optimality conditions."""
    NOT_FINITE = 6
    """The data hold a NaN or an infinity (h = +inf, "no bound", is allowed)."""


_REMEDY = {
    Status.INFEASIBLE: "relax G x <= h, or check its signs",
    Status.UNBOUNDED: "add bounds, or a quadratic term (reg > 0)",
    Status.NON_CONVEX: "Q must be positive semi-definite: build it as M M', or give reg larger than its negative "
    "eigenvalue",
    Status.INCONSISTENT: "A x = b has no solution: remove the contradicting rows",
    Status.NOT_CONVERGED: "remove rows that nearly depend on each other, add a quadratic term (reg > 0), or choose "
    "another solver",
    Status.NOT_FINITE: "look for a NaN or an infinity in Q, p, A, b, G or h",
}


class ProblemFailedError(NewtonPluginError, ValueError):
    """A problem has no solution (or none was found), and ``on_failure="raise"``."""


class MissingSolverError(NewtonPluginError, ImportError):
    """The chosen solver is not installed."""


class NestedForwardError(NewtonPluginError, RuntimeError):
    """Forward mode inside forward mode: PyTorch computes it wrongly for custom functions."""


class ProblemFailedWarning(UserWarning):
    """A problem has no solution (or none was found), and ``on_failure="warn"``; its x is NaN."""


class NonUniqueSolutionWarning(UserWarning):
    """The solution is one of many, so its derivative is only one choice (the least-norm one)."""


def report_failures(
    status: Tensor, on_failure: str, shape: tuple[int, ...], remedies: dict[Status, str] = _REMEDY
) -> None:
    """Raise or warn as ``on_failure`` asks, and name the batch indices. Costs one host synchronisation."""
    if on_failure == "nan" or not bool((status != 0).any()):
        return
    message = describe(status, shape, remedies)
    if on_failure == "raise":
        raise ProblemFailedError(f'{message} on_failure="nan" or "warn" returns NaN for these instead.')
    warnings.warn(f"{message} Their x is NaN.", ProblemFailedWarning, stacklevel=2)


def describe(status: Tensor, shape: tuple[int, ...], remedies: dict[Status, str]) -> str:
    """One sentence for each kind of failure: its name, its batch indices and a remedy."""
    if len(shape) > 1 and status.numel() == torch.Size(shape).numel():
        status = status.reshape(shape)
    sentences = []
    for kind in Status:
        if kind == Status.SOLVED or not bool((status == kind).any()):
            continue
        name = kind.name.lower().replace("_", " ")
        places = [tuple(row) if len(row) > 1 else row[0] for row in (status == kind).nonzero().tolist() if row]
        where = ""
        if shape:
            shown = ", ".join(str(place) for place in places[:20]) + (", ..." if len(places) > 20 else "")
            where = f" at batch index {shown}"
        name = "inconsistent equalities" if kind == Status.INCONSISTENT else name
        sentences.append(f"{name}{where}: {remedies[kind]}.")
    return "no solution: " + " ".join(sentences)


_REGULARISE = "reg > 0 (e.g. 1e-6 times the scale of Q or p)"


def warn_not_unique(which: Tensor, shape: tuple[int, ...], remedy: str = _REGULARISE) -> None:
    """Warn where several x are optimal."""
    places = which.nonzero().flatten().tolist()
    where = f" at batch index {', '.join(map(str, places[:20]))}" if shape else ""
    warnings.warn(
        f"the solution is not unique{where}: x is one of many minimisers and its derivative is the least-norm one. "
        f"{remedy} makes it unique and differentiable.",
        NonUniqueSolutionWarning,
        stacklevel=2,
    )
