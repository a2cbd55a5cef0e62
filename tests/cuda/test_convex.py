"""Convex programs on the device: solutions and gradients of a CPU; sparse problems are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.convex.problems import Known, known_qp
from tests.cuda.device import DEVICE, cuda_alone, error, there
from torch import Tensor

import newton_plugin as npl
from newton_plugin.convex import BPQPLayer, ConvexLayer, QPSolution, Status, solve_qp

PROBLEMS = {
    "unconstrained": known_qp(4, batch=3),
    "equalities": known_qp(5, 2, batch=3),
    "inequalities": known_qp(5, 0, 8, batch=4, active=0.4),
    "both": known_qp(6, 2, 9, batch=4),
    "shared": known_qp(6, 2, 9, batch=5, shared=True),
    "one": known_qp(5, 1, 6),
}


def solved(known: Known, move: Any, **options: Any) -> tuple[QPSolution, list[Tensor]]:
    """The solution, and the gradients of a weighted sum of all that it is made of."""
    data: list[Any] = [None if t is None else move(t).requires_grad_() for t in known.data]
    solution = solve_qp(*data, **options)
    total = sum(
        (part * torch.linspace(0.5, 1.5, part.numel(), dtype=torch.float64).to(part).view_as(part)).sum()
        for part in (solution.x, solution.nu, solution.lam)
    )
    assert isinstance(total, Tensor)
    given = [t for t in data if t is not None]
    return solution, list(torch.autograd.grad(total, given, materialize_grads=True))


@pytest.mark.parametrize("solver", ["auto", "torch", "numba", "daqp"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_solutions_and_gradients(name: str, solver: str) -> None:
    """ "auto" is the batched torch solver on a device; the others look for the active rows on the CPU."""
    if solver in ("numba", "daqp"):
        pytest.importorskip(solver)
    known = PROBLEMS[name]
    ours, gradients = solved(known, there, solver=solver)
    _, expected = solved(known, torch.clone, solver="torch")
    assert all(part.device == DEVICE for part in (ours.x, ours.nu, ours.lam, ours.status, ours.active, *gradients))
    if DEVICE.type == "cuda" and solver == "auto":
        assert ours.solver == "torch"
    assert error(ours.x, known.x) <= 1e-8
    assert torch.equal(ours.active.cpu(), known.active)
    assert max(map(error, gradients, expected)) <= 1e-8


def test_float32_in_and_out() -> None:
    known = PROBLEMS["both"]
    data = [None if t is None else there(t.float()) for t in known.data]
    x = BPQPLayer()(*data)
    assert x.dtype == torch.float32
    assert x.device == DEVICE
    assert error(x, known.x) <= 1e-4


def test_many_problems_with_several_vertices() -> None:
    """Ties and rows that depend on one another: the slower ways through the solver, with the CPU's answers."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(64, 3, generator=generator, dtype=torch.float64).round()
    G, h = torch.cat([torch.eye(3), -torch.eye(3), torch.ones(1, 3), torch.ones(1, 3)]).double(), torch.ones(8).double()

    def answer(move: Any) -> QPSolution:
        return solve_qp(move(torch.eye(3).double()), move(p), G=move(G), h=move(h), solver="torch")

    ours, theirs = answer(there), answer(torch.clone)
    assert error(ours.x, theirs.x) <= 1e-8
    assert torch.equal(ours.status.cpu(), theirs.status)


def test_a_problem_without_a_solution() -> None:
    Q, G = there(torch.eye(2).double()), there(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double())
    p, h = there(torch.zeros(2, 2).double()), there(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]).double())
    solution = solve_qp(Q, p, G=G, h=h, on_failure="nan")
    assert solution.status.tolist() == [int(Status.INFEASIBLE), int(Status.SOLVED)]
    assert torch.isnan(solution.x).any(-1).tolist() == [True, False]


def test_a_newton_step_above_a_layer() -> None:
    known = PROBLEMS["shared"]

    def taken(move: Any) -> Tensor:
        Q, _, A, b, G, h = (None if t is None else move(t) for t in known.data)
        assert Q is not None

        def regret(p: Tensor) -> Tensor:
            return (solve_qp(Q, p, A, b, G, h).x - move(known.x) - 1).square().sum(-1).mean()

        p = move(known.data[1]).requires_grad_()
        return npl.newton_step(regret, p, curvature="hessian", damping=0.1).step

    assert error(taken(there), taken(torch.clone)) <= 1e-8


def test_convex_layers() -> None:
    """The nearest points of the unit disc, a second-order cone program."""
    layer = ConvexLayer(
        lambda x, t: ((x - t) ** 2).sum(), inequality=lambda x, t: torch.linalg.vector_norm(x)[None] - 1, variables=2
    )

    def derived(move: Any) -> list[Tensor]:
        theta = move(torch.tensor([[3.0, 4.0], [1.0, 2.0], [-2.0, 1.0]]).double()).requires_grad_()
        x = layer(theta, in_dims=0)
        (gradient,) = torch.autograd.grad((x * x.new_tensor([1.0, 2.0])).sum(), theta)
        return [x, gradient, layer(theta[0])]

    ours, theirs = derived(there), derived(torch.clone)
    assert all(part.device == DEVICE for part in ours)
    assert max(map(error, ours, theirs)) <= 1e-8


@cuda_alone
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_problems_are_refused(layout: str) -> None:
    Q = torch.eye(3, dtype=torch.float64, device=DEVICE)
    with pytest.raises(npl.ArgumentError, match=r"sparse problems are solved on the CPU.*Move the data with \.cpu"):
        solve_qp(
            Q.to_sparse() if layout == "coo" else Q.to_sparse_csr(), torch.ones(3, dtype=torch.float64, device=DEVICE)
        )
