"""Solvers of other packages: DAQP, PIQP, Clarabel and OSQP, each imported when it is first used.

Each function here solves one problem. It takes (Q, p, C, c, m), numpy arrays or scipy.sparse matrices, and returns a
status, x and the multipliers y of all rows. Their accuracy only has to tell active rows from the others.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from newton_plugin.convex._solvers.active_rows import rows_from_duals
from newton_plugin.convex._status import MissingSolverError, Status
from newton_plugin.convex._system.problem import Problem

__all__ = ["EXTERNAL", "ExternalSolver", "ask", "load"]

Answer = tuple[Status, Any, Any]

_EXTRA = '"newton-plugin[convex]"'
_EQUALITY = 5  # DAQP's code
_FAR = 1e30  # these solvers read it as "no bound"


def load(module: str, install: str) -> Any:
    """The module; if it is missing, an error that says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingSolverError(
            f"this solver needs the package {module!r}, which is not installed. Install it with: "
            f"pip install {install}; or use solver='torch', which needs nothing."
        ) from error


def daqp(Q: Any, p: Any, C: Any, c: Any, m: int) -> Answer:
    """A dual active-set method in C: exact, and the fastest for few variables.

    Source: Arnstrom, Bemporad, Axehill, "A dual active-set solver for embedded quadratic programming using
    recursive LDL' updates", IEEE Transactions on Automatic Control 2022.
    """
    numpy = load("numpy", "numpy")
    upper = numpy.minimum(c, _FAR)
    lower = upper.copy()
    lower[m:] = -_FAR
    sense = numpy.zeros(len(c), numpy.int32)
    sense[:m] = _EQUALITY
    x, _, flag, info = load("daqp", _EXTRA).solve(Q, p, C, upper, lower, sense, primal_tol=1e-9)
    return (Status.SOLVED if flag > 0 else Status.NOT_CONVERGED), x, info["lam"]


def piqp(Q: Any, p: Any, C: Any, c: Any, m: int) -> Answer:
    """A proximal interior-point method; dense or sparse. Source: Schwan et al., CDC 2023."""
    module = load("piqp", "piqp")
    if hasattr(C, "tocsc"):
        solver = module.SparseSolver()
        Q, A, G = Q.tocsc(), C[:m].tocsc(), C[m:].tocsc()
    else:
        solver = module.DenseSolver()
        Q, A, G = (part.copy(order="F") for part in (Q, C[:m], C[m:]))
    solver.settings.eps_abs = solver.settings.eps_rel = 1e-10
    solver.setup(Q, p, A if m else None, c[:m] if m else None, G, (c[m:] * 0 - _FAR).clip(-_FAR), c[m:].clip(max=_FAR))
    code = solver.solve()
    status = {
        module.PIQP_SOLVED: Status.SOLVED,
        module.PIQP_PRIMAL_INFEASIBLE: Status.INFEASIBLE,
        module.PIQP_DUAL_INFEASIBLE: Status.UNBOUNDED,
    }.get(code, Status.NOT_CONVERGED)
    y = load("numpy", "numpy").zeros(len(c))
    y[:m], y[m:] = solver.result.y[:m], solver.result.z_u
    return status, solver.result.x, y


def clarabel(Q: Any, p: Any, C: Any, c: Any, m: int) -> Answer:
    """An interior-point method with sparse factorisations, for large sparse problems.

    Source: Goulart and Chen, "Clarabel: An interior-point solver for conic programs with quadratic objectives",
    2024.
    """
    module = load("clarabel", "clarabel")
    sparse = load("scipy.sparse", _EXTRA)
    bounded = c < 1e19
    bounded[:m] = True
    rows, right = sparse.csc_matrix(C)[bounded], c[bounded]
    settings = module.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-10
    cones = ([module.ZeroConeT(m)] if m else []) + ([module.NonnegativeConeT(len(right) - m)] if len(right) > m else [])
    upper = sparse.triu(sparse.csc_matrix(Q)).tocsc()
    answer = module.DefaultSolver(upper, p, rows, right, cones, settings).solve()
    name = str(answer.status)
    status = {
        "Solved": Status.SOLVED,
        "AlmostSolved": Status.SOLVED,
        "PrimalInfeasible": Status.INFEASIBLE,
        "DualInfeasible": Status.UNBOUNDED,
    }.get(name, Status.NOT_CONVERGED)
    numpy = load("numpy", "numpy")
    y = numpy.zeros(len(c))
    y[bounded] = answer.z
    return status, numpy.array(answer.x), y


def osqp(Q: Any, p: Any, C: Any, c: Any, m: int) -> Answer:
    """Operator splitting: cheap iterations, low accuracy. Source: Stellato et al., Math. Prog. Comp. 2020."""
    module = load("osqp", "osqp")
    sparse = load("scipy.sparse", _EXTRA)
    lower = c.copy()
    lower[m:] = -_FAR
    problem = module.OSQP()
    problem.setup(
        P=sparse.triu(sparse.csc_matrix(Q)).tocsc(),
        q=p,
        A=sparse.csc_matrix(C),
        l=lower,
        u=c.clip(max=_FAR),
        verbose=False,
        eps_abs=1e-9,
        eps_rel=1e-9,
        max_iter=20000,
        polishing=True,
    )
    answer = problem.solve(raise_error=False)
    name = answer.info.status
    if name.startswith("solved"):
        return Status.SOLVED, answer.x, answer.y
    if name.startswith("primal infeasible"):
        return Status.INFEASIBLE, answer.x, answer.y
    return (Status.UNBOUNDED if name.startswith("dual infeasible") else Status.NOT_CONVERGED), answer.x, answer.y


EXTERNAL: dict[str, Callable[..., Answer]] = {"clarabel": clarabel, "daqp": daqp, "osqp": osqp, "piqp": piqp}


def ask(fn: Callable[..., Answer], Q: Any, p: Any, C: Any, c: Any, m: int) -> Answer:
    """The solver's answer. An exception on data that it cannot take counts as NOT_CONVERGED, so that others decide."""
    try:
        return fn(Q, p, C, c, m)
    except MissingSolverError:
        raise
    except Exception:
        return Status.NOT_CONVERGED, p, c


class ExternalSolver:
    """One of the solvers above on a batch: one problem after the other."""

    def __init__(self, name: str) -> None:
        self.name = name

    def active_rows(self, problem: Problem) -> Tensor:
        if self.name == "daqp":
            return daqp_rows(problem)
        numpy = load("numpy", "numpy")
        fn, m = EXTERNAL[self.name], problem.m
        Q, C, p, c = (t.cpu().numpy() for t in (problem.Q, problem.C, problem.p, problem.c))
        x, y = numpy.zeros_like(p), numpy.zeros_like(c)
        for i, (Qi, Ci) in enumerate(zip(each(Q), each(C), strict=False)):
            if i == len(p):
                break
            status, xi, yi = ask(fn, Qi, p[i], Ci, c[i], m)
            if status == Status.SOLVED:
                x[i], y[i] = xi, yi
        return rows_from_duals(problem, torch.from_numpy(x).to(problem.p), torch.from_numpy(y).to(problem.p))


def each(matrices: Any) -> Iterable[Any]:
    """The matrices of a batch one by one; a shared matrix is repeated."""
    return itertools.repeat(matrices) if matrices.ndim == 2 else matrices


def daqp_rows(problem: Problem) -> Tensor:
    """Active rows by DAQP. Only the call itself is inside the loop: 7 us a problem at n = 10."""
    numpy = load("numpy", "numpy")
    solve = load("daqp", _EXTRA).solve
    Q, C, p, c = (t.cpu().numpy() for t in (problem.Q, problem.C, problem.p, problem.c))
    upper = numpy.minimum(c, _FAR)
    lower = upper.copy()
    lower[:, problem.m :] = -_FAR
    sense = numpy.zeros(c.shape[1], numpy.int32)
    sense[: problem.m] = _EQUALITY
    if Q.ndim == 2 and C.ndim == 2 and len(p) > 1:
        # Least-distance form, x' = L'x: one factorisation for the batch, and the multipliers stay the same.
        factor, info = torch.linalg.cholesky_ex(problem.Q)
        if int(info) == 0:
            C = torch.linalg.solve_triangular(factor, problem.C.mT, upper=False).mT.contiguous().cpu().numpy()
            p = torch.linalg.solve_triangular(factor, problem.p.mT, upper=False).mT.contiguous().cpu().numpy()
            Q = numpy.eye(len(Q))
    lam = numpy.zeros_like(c)
    for i, (Qi, Ci, pi, ui, li) in enumerate(zip(each(Q), each(C), p, upper, lower, strict=False)):
        _, _, flag, info = solve(Qi, pi, Ci, ui, li, sense, primal_tol=1e-9)
        if flag > 0:
            lam[i] = info["lam"]
    return torch.from_numpy(lam > 0).to(problem.p.device)
