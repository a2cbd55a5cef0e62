"""No solution, several solutions, redundant rows, degenerate points: each has its status, and never a wrong answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.convex.problems import known_qp
from torch import Tensor

from newton_plugin import ArgumentError, ArgumentTypeError, NewtonPluginError, ShapeError
from newton_plugin.convex import (
    MissingSolverError,
    NonUniqueSolutionWarning,
    ProblemFailedError,
    ProblemFailedWarning,
    QPSolution,
    Status,
    solve_qp,
)


def t(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


EYE = torch.eye(2, dtype=torch.float64)
ZERO = torch.zeros(2, 2, dtype=torch.float64)
BOX = torch.cat((EYE, -EYE))
SOLVERS = ["torch", "auto"]

FAILING = {
    "infeasible": ((EYE, t(1, 1), None, None, t([1, 0], [-1, 0]), t(-1, -1)), Status.INFEASIBLE),
    "infeasible with equality": ((EYE, t(1, 1), t([1, 1]), t(3), BOX, t(1, 1, 1, 1)), Status.INFEASIBLE),
    "infeasible row of zeros": ((EYE, t(1, 1), None, None, t([0, 0]), t(-1)), Status.INFEASIBLE),
    "barely infeasible": ((EYE, t(1, 1), None, None, t([1, 1], [-1, -1]), t(1, -1 - 1e-6)), Status.INFEASIBLE),
    "infeasible linear": ((ZERO, t(1, 1), None, None, t([1, 0], [-1, 0]), t(-1, -1)), Status.INFEASIBLE),
    "inconsistent": ((EYE, t(1, 1), t([1, 1], [2, 2]), t(1, 2.1), None, None), Status.INCONSISTENT),
    "unbounded linear": ((ZERO, t(-1, -1), None, None, EYE, t(1, torch.inf)), Status.UNBOUNDED),
    "unbounded flat": ((torch.diag(t(1, 0)), t(0, 1), None, None, None, None), Status.UNBOUNDED),
    "non-convex": ((torch.diag(t(1, -1)), t(0, 1), None, None, BOX, t(1, 1, 1, 1)), Status.NON_CONVEX),
    "nan": ((EYE, t(0, torch.nan), None, None, BOX, t(1, 1, 1, 1)), Status.NOT_FINITE),
    "nan in Q": ((EYE * torch.nan, t(0, 1), None, None, BOX, t(1, 1, 1, 1)), Status.NOT_FINITE),
}


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", FAILING)
def test_failures_have_a_status(case: str, solver: str) -> None:
    data, status = FAILING[case]
    solution = solve_qp(*data, solver=solver, on_failure="nan")
    assert solution.status.item() == status
    assert solution.x.isnan().all()
    word = "inconsistent equalities" if status == Status.INCONSISTENT else status.name.lower().replace("_", " ")
    with pytest.raises(ProblemFailedError, match=f"no solution: {word}: .*on_failure="):
        solve_qp(*data, solver=solver)
    with pytest.warns(ProblemFailedWarning, match=word):
        solve_qp(*data, solver=solver, on_failure="warn")


@pytest.mark.parametrize("solver", ["piqp", "clarabel", "osqp"])
def test_the_judge_is_the_same_for_all_solvers(solver: str) -> None:
    pytest.importorskip(solver)
    for data, status in FAILING.values():
        if status != Status.NOT_FINITE:
            assert solve_qp(*data, solver=solver, on_failure="nan").status.item() == status


@pytest.mark.parametrize("solver", SOLVERS)
def test_failing_neighbours_change_no_bit(solver: str) -> None:
    """Every solvable problem of a batch has the bits of being solved alone: values and gradients."""
    known = known_qp(6, 1, 8, batch=8, active=0.4, condition=100.0, seed=1)
    Q, p, A, b, G, h = (part.clone() for part in known.data if part is not None)
    Q[1] = -Q[1]
    G[3, 1], h[3, :2] = -G[3, 0], -50.0
    p[5] = torch.nan
    Q[6] = 0.0
    data = [part.requires_grad_() for part in (Q, p, A, b, G, h)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonUniqueSolutionWarning)
        solution = solve_qp(*data, solver=solver, on_failure="nan")
    assert solution.status[[1, 3, 5]].tolist() == [Status.NON_CONVEX, Status.INFEASIBLE, Status.NOT_FINITE]
    good = [0, 2, 4, 7]
    assert (solution.status[good] == 0).all()
    gradients = torch.autograd.grad(solution.x[good].square().sum(), data)
    for i in good:
        alone = [part.detach()[i : i + 1].clone().requires_grad_() for part in data]
        single = solve_qp(*alone, solver=solver)
        assert torch.equal(solution.x[i], single.x[0])
        assert torch.equal(solution.lam[i], single.lam[0])
        for ours, theirs in zip(gradients, torch.autograd.grad(single.x.square().sum(), alone), strict=True):
            assert torch.equal(ours[i], theirs[0])
            assert (ours[[1, 3, 5]] == 0).all()  # problems without solution send nothing back


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("size", [(6, 1, 8), (9, 2, 13), (50, 4, 20), (13, 3, 29), (50, 10, 50)])
def test_alone_or_together(size: tuple[int, int, int], shared: bool) -> None:
    """The bits of a batch of one with up to 24 rows of constraints; beyond that the same to rounding."""
    known = known_qp(*size, batch=11, shared=shared, active=0.4, condition=100.0, seed=1)
    Q, p, A, b, G, h = (part for part in known.data if part is not None)
    h = h.clone()
    h[4] = torch.nan
    together = solve_qp(Q, p, A, b, G, h, on_failure="nan", solver="torch")
    for i in (0, 3, 10):
        one = [t if shared and t.ndim == 2 and t.shape[0] != 11 else t[i : i + 1] for t in (Q, p, A, b, G, h)]
        alone = solve_qp(*one, solver="torch")
        if size[1] + size[2] <= 24:
            assert torch.equal(together.x[i], alone.x[0])
            assert torch.equal(together.lam[i], alone.lam[0])
        assert torch.allclose(together.x[i], alone.x[0], rtol=1e-13, atol=1e-13)


def test_messages_name_the_batch_indices() -> None:
    b = torch.stack((t(1, 1), t(1, 2), t(3, 3), t(3, 4))).reshape(2, 2, 2)
    data = (EYE, t(1, 1), t([1, 0], [1, 0]), b)
    with pytest.raises(ProblemFailedError, match=r"inconsistent equalities at batch index \(0, 1\), \(1, 1\)"):
        solve_qp(*data)
    with pytest.raises(ProblemFailedError, match=r"inconsistent equalities at batch index 1:"):
        solve_qp(*data[:3], b[0])
    solution = solve_qp(*data, on_failure="nan")
    assert solution.x.isnan().any(-1).tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize("solver", SOLVERS)
def test_redundant_rows_leave_x_exact(solver: str) -> None:
    known = known_qp(6, 2, 8, active=0.4, condition=100.0, seed=4)
    Q, p, A, b, G, h = (part for part in known.data if part is not None)
    A2, b2 = torch.cat((A, A[:1], 2 * A[1:])), torch.cat((b, b[:1], 2 * b[1:]))
    G2, h2 = torch.cat((G, G, 3 * G)), torch.cat((h, h, 3 * h))
    h2 = h2.requires_grad_()
    solution = solve_qp(Q, p, A2, b2, G2, h2, solver=solver)
    assert (solution.x - known.x).abs().max() < 1e-12
    assert (solution.lam >= 0).all()
    stationary = Q @ solution.x + p + A2.mT @ solution.nu + G2.mT @ solution.lam
    assert stationary.abs().max() < 1e-11
    first = torch.autograd.grad(solution.x.sum(), h2)[0]
    assert torch.isfinite(first).all()
    again = torch.autograd.grad(solve_qp(Q, p, A2, b2, G2, h2, solver=solver).x.sum(), h2)[0]
    assert torch.equal(first, again)
    # Moving all copies of a row together is moving the row.
    h = h.detach().requires_grad_()
    plain = torch.autograd.grad(solve_qp(Q, p, A, b, G, h).x.sum(), h)[0]
    assert torch.allclose(first[:8] + first[8:16] + 3 * first[16:], plain, rtol=1e-9, atol=1e-11)


def test_weakly_active_rows_have_a_one_sided_derivative() -> None:
    """At the point where a constraint begins to bind, x moves as if it did not: one of the two sides."""
    p = t(-1, -1).requires_grad_()
    solution = solve_qp(EYE, p, None, None, EYE, t(1, 1))
    assert solution.x.tolist() == [1, 1]
    assert not solution.active.any()
    assert torch.autograd.functional.jacobian(lambda p: solve_qp(EYE, p, None, None, EYE, t(1, 1)).x, p).equal(-EYE)


class TestLinearPrograms:
    def test_vertex(self) -> None:
        c, h = t(-1, -2).requires_grad_(), t(1, 1, 0, 0).requires_grad_()
        solution = solve_qp(ZERO, c, t([1, 1]), t(1.5), BOX, h)
        assert torch.allclose(solution.x, t(0.5, 1))
        dc, dh = torch.autograd.grad(solution.x[0], (c, h))
        assert torch.allclose(dc, t(0, 0), atol=1e-14)
        assert torch.allclose(dh, t(0, -1, 0, 0))  # x_1 = 1.5 - h_2

    def test_against_highs(self) -> None:
        linprog = pytest.importorskip("scipy.optimize").linprog
        g = torch.Generator().manual_seed(0)
        for _ in range(5):
            G = torch.randn(25, 8, generator=g, dtype=torch.float64)
            h = torch.rand(25, generator=g, dtype=torch.float64) + 0.1
            c = -(G.mT @ torch.rand(25, generator=g, dtype=torch.float64))
            solution = solve_qp(torch.zeros(8, 8, dtype=torch.float64), c, G=G, h=h)
            reference = linprog(c.numpy(), G.numpy(), h.numpy(), bounds=(None, None))
            assert abs(float(c @ solution.x) - reference.fun) < 1e-9
            assert int(solution.active.sum()) == 8

    def test_not_unique_warns_and_reg_makes_it_unique(self) -> None:
        data = (ZERO, t(-1, -1), t([1, 1]), t(1), BOX, t(1, 1, 0, 0))
        with pytest.warns(NonUniqueSolutionWarning, match=r"reg > 0"):
            solution = solve_qp(*data)
        assert abs(solution.x.sum().item() - 1) < 1e-12
        assert torch.allclose(solve_qp(*data, reg=1e-6).x, t(0.5, 0.5), atol=1e-10)

    def test_singular_quadratic(self) -> None:
        solution = solve_qp(torch.diag(t(1, 0)), t(1, -1), None, None, EYE, t(5, 5))
        assert torch.allclose(solution.x, t(-1, 5))
        assert torch.allclose(solution.lam, t(0, 1))


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.integers(0, 1000), st.floats(-6, 6), st.floats(-6, 6))
def test_units_do_not_matter(seed: int, objective: float, rows: float) -> None:
    """Scaling the objective or the rows leaves x and the active rows: all thresholds are relative."""
    known = known_qp(5, 1, 6, active=0.4, condition=10.0, seed=seed)
    Q, p, A, b, G, h = (part for part in known.data if part is not None)
    f, r = 10.0**objective, 10.0**rows
    scaled = solve_qp(f * Q, f * p, r * A, r * b, r * G, r * h, solver="torch")
    assert torch.allclose(scaled.x, known.x, rtol=1e-9, atol=1e-10)
    assert torch.equal(scaled.active, known.active)
    assert torch.allclose(scaled.lam * r / f, known.lam, rtol=1e-8, atol=1e-10)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 10000))
def test_never_a_plausible_answer(seed: int) -> None:
    """Random rows, feasible or not: what is called solved meets the optimality conditions."""
    g = torch.Generator().manual_seed(seed)
    n, k = 4, 9
    M = torch.randn(n, n - (seed % 2), generator=g, dtype=torch.float64)
    G = torch.randn(k, n, generator=g, dtype=torch.float64).round()
    h = torch.randn(k, generator=g, dtype=torch.float64).round()
    p = torch.randn(n, generator=g, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NonUniqueSolutionWarning)
        solution = solve_qp(M @ M.mT, p, G=G, h=h, solver="torch", on_failure="nan")
    linprog = pytest.importorskip("scipy.optimize").linprog
    feasible = linprog([0] * n, G.numpy(), h.numpy(), bounds=(None, None)).status == 0
    status = solution.status.item()
    assert (status == Status.INFEASIBLE) == (not feasible)
    assert status in (Status.SOLVED, Status.INFEASIBLE, Status.UNBOUNDED)
    if status == Status.SOLVED:
        slack = h - G @ solution.x
        assert slack.min() > -1e-9
        assert solution.lam.min() > -1e-9
        assert (slack * solution.lam).abs().max() < 1e-8
        assert (M @ M.mT @ solution.x + p + G.mT @ solution.lam).abs().max() < 1e-8


BAD: dict[str, tuple[Callable[[], QPSolution], type[NewtonPluginError], str]] = {
    "A without b": (lambda: solve_qp(EYE, t(1, 1), A=EYE), ArgumentError, "A was given without b"),
    "h without G": (lambda: solve_qp(EYE, t(1, 1), h=t(1)), ArgumentError, "h was given without G"),
    "Q shape": (lambda: solve_qp(torch.eye(3), torch.ones(2)), ShapeError, r"Q must have shape \(\.\.\., 2, 2\)"),
    "G shape": (lambda: solve_qp(EYE, t(1, 1), G=EYE, h=t(1)), ShapeError, r"G must have shape \(\.\.\., 1, 2\)"),
    "scalar h": (lambda: solve_qp(EYE, t(1, 1), G=EYE, h=torch.tensor(1.0)), ShapeError, r"One row is h\[None\]"),
    "p shape": (lambda: solve_qp(EYE, torch.tensor(1.0)), ShapeError, r"p must have shape"),
    "batches": (lambda: solve_qp(EYE.expand(3, 2, 2), torch.ones(2, 2)), ShapeError, "do not broadcast"),
    "type": (lambda: solve_qp([[1.0]], torch.ones(1)), ArgumentTypeError, "Q must be a torch.Tensor"),
    "dtype": (lambda: solve_qp(torch.eye(2).long(), torch.ones(2)), ArgumentTypeError, "floating-point"),
    "solver": (lambda: solve_qp(EYE, t(1, 1), solver="gurobi"), ArgumentError, "solver must be one of 'auto'"),
    "solver type": (lambda: solve_qp(EYE, t(1, 1), solver=3), ArgumentTypeError, "a QPSolver or a callable"),
    "solver answer": (
        lambda: solve_qp(EYE, t(1, 1), solver=lambda *data: None),
        ArgumentTypeError,
        r"must return \(x, nu, lam\)",
    ),
    "solver shapes": (
        lambda: solve_qp(EYE, t(1, 1), solver=lambda *data: (t(1), t(1), t(1))),
        ArgumentError,
        "must return x of shape",
    ),
    "reg": (lambda: solve_qp(EYE, t(1, 1), reg=-1.0), ArgumentError, "reg must be finite and >= 0"),
    "reg type": (lambda: solve_qp(EYE, t(1, 1), reg="a"), ArgumentTypeError, "reg must be a number"),
    "refine": (lambda: solve_qp(EYE, t(1, 1), refine="yes"), ArgumentError, "refine must be one of"),
    "on_failure": (lambda: solve_qp(EYE, t(1, 1), on_failure="no"), ArgumentError, "on_failure must be one of"),
    "jacobian": (lambda: solve_qp(EYE, t(1, 1)).jacobian("x"), ArgumentError, "wrt must be one of"),
    "hessian in Q": (lambda: solve_qp(EYE, t(1, 1)).hessian(EYE, "Q"), ArgumentError, "torch.func.hessian"),
    "hessian shape": (lambda: solve_qp(EYE, t(1, 1)).hessian(t([1])), ShapeError, "outer must have shape"),
}


@pytest.mark.parametrize("case", BAD)
def test_messages(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_a_missing_solver_names_the_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    real = importlib.import_module

    def missing(name: str) -> object:
        if name == "clarabel":
            raise ImportError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(MissingSolverError, match=r"pip install clarabel; or use solver='torch'"):
        solve_qp(EYE, t(1, 1), solver="clarabel")
