"""x to 1e-10 and all six gradients to 1e-9 against a dense twin, over QPs whose solution is known."""

from __future__ import annotations

import pytest
import torch
from tests.convex.problems import Known, known_qp, twin
from torch import Tensor

from newton_plugin.convex import solve_qp

SIZES = [(5, 0, 0), (8, 3, 0), (13, 4, 29), (10, 0, 100), (30, 5, 30)]


def relative(value: Tensor, reference: Tensor) -> float:
    return float(((value - reference).norm() / reference.norm().clamp(min=1e-300)).detach())


def check(known: Known, solver: str) -> None:
    leaves = known.leaves()
    solution = solve_qp(*known.data, solver=solver)
    g = torch.Generator().manual_seed(1)
    weights = tuple(torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (known.x, known.nu, known.lam))
    x, gradients = twin(known, weights)
    assert (solution.x - known.x).abs().max() < 1e-10 * known.x.abs().max().clamp(min=1)
    assert relative(solution.x, x) < 1e-10
    assert torch.equal(solution.active, known.active)
    parts = (solution.x, solution.nu, solution.lam)
    loss = torch.stack([(w * t).sum() for w, t in zip(weights, parts, strict=True)]).sum()
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), gradients, strict=True):
        assert relative(ours, theirs) < 1e-9


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("active", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("solver", ["torch", "auto"])
def test_own_matrices(solver: str, condition: float, active: float, size: tuple[int, int, int]) -> None:
    seed = sum(size) + int(10 * active)
    check(known_qp(*size, batch=3, active=active, condition=condition, strictness=1e-4, seed=seed), solver)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("condition", [10.0, 1e6])
@pytest.mark.parametrize("batch", [None, 1, 4])
def test_shared_matrices(batch: int | None, condition: float, size: tuple[int, int, int]) -> None:
    known = known_qp(*size, batch=batch, shared=True, active=0.4, condition=condition, strictness=1e-3, seed=7)
    check(known, "torch")


@pytest.mark.parametrize("solver", ["torch", "auto"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_of_64(shared: bool, solver: str) -> None:
    check(known_qp(10, 2, 10, batch=64, shared=shared, active=0.5, condition=100.0, seed=2), solver)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("strictness", [0.1, 1e-4])
@pytest.mark.parametrize("condition", [10.0, 1e6])
def test_larger(condition: float, strictness: float, seed: int) -> None:
    check(known_qp(60, 20, 120, batch=16, active=0.3, condition=condition, strictness=strictness, seed=seed), "torch")
    check(known_qp(100, 10, 100, batch=2, active=0.5, condition=condition, strictness=strictness, seed=seed), "auto")


def test_large_problems_one_after_the_other() -> None:
    """Above 200 variables a batch is a loop: the same bits, values and gradients, as one by one."""
    known = known_qp(202, 10, 60, batch=2, active=0.3, seed=1)
    leaves = known.leaves()
    check(known, "torch")
    x = solve_qp(*known.data, solver="torch").x
    gradients = torch.autograd.grad(x.square().sum(), leaves)
    for i in range(2):
        alone = [t.detach()[i : i + 1].clone().requires_grad_() for t in leaves]
        single = solve_qp(*alone, solver="torch").x
        assert torch.equal(single[0], x[i])
        for a, b in zip(torch.autograd.grad(single.square().sum(), alone), gradients, strict=True):
            assert torch.equal(a[0], b[i])


@pytest.mark.parametrize("solver", ["daqp", "piqp", "clarabel", "osqp"])
def test_any_solver_gives_the_same_digits(solver: str) -> None:
    pytest.importorskip(solver)
    check(known_qp(12, 3, 20, batch=3, active=0.3, condition=100.0, seed=5), solver)
    assert solve_qp(*known_qp(4, 1, 5, seed=1).data, solver=solver).solver == solver


def test_own_callable_of_low_accuracy() -> None:
    """A callable that is right to two digits: the answer is right to all."""
    known = known_qp(8, 2, 10, batch=4, active=0.4, strictness=0.3, seed=3)

    def rough(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = torch.nn.functional.pad(known.x, (0, p.shape[-1] - 8)) * 1.003
        lam = torch.nn.functional.pad(known.lam, (0, h.shape[-1] - 10)) * 0.99
        return x, torch.zeros_like(b), lam

    solution = solve_qp(*known.data, solver=rough)
    assert solution.solver == "rough"
    assert (solution.x - known.x).abs().max() < 1e-12


def test_a_wrong_callable_costs_time_only() -> None:
    known = known_qp(8, 2, 10, batch=4, active=0.4, seed=3)

    def wrong(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ones_like(p), torch.zeros_like(b), torch.ones_like(h)

    assert (solve_qp(*known.data, solver=wrong).x - known.x).abs().max() < 1e-10


def test_float32_in_and_out() -> None:
    known = known_qp(6, 1, 8, batch=2, seed=1)
    data = [t.float().requires_grad_() for t in known.data if t is not None]
    solution = solve_qp(*data)
    assert solution.x.dtype == solution.nu.dtype == solution.lam.dtype == torch.float32
    assert (solution.x - known.x).abs().max() < 1e-4
    for gradient, t in zip(torch.autograd.grad(solution.x.sum(), data), data, strict=True):
        assert gradient.dtype == torch.float32
        assert gradient.shape == t.shape


def test_batch_dimensions_broadcast() -> None:
    known = known_qp(5, 1, 4, seed=2)
    Q, p, A, b, G, h = known.data
    assert Q is not None
    assert p is not None
    solution = solve_qp(Q.expand(3, 1, 5, 5), p.expand(2, 5), A, b, G, h)
    assert solution.x.shape == (3, 2, 5)
    assert solution.status.shape == (3, 2)
    assert solution.active.shape == (3, 2, 4)
    assert (solution.x - known.x).abs().max() < 1e-12


def test_only_the_symmetric_part_of_q_counts() -> None:
    known = known_qp(5, 1, 4, seed=2)
    Q, *rest = known.data
    skew = torch.triu(torch.ones(5, 5, dtype=torch.float64), 1)
    assert (solve_qp(Q + skew - skew.mT, *rest).x - known.x).abs().max() < 1e-12


def test_an_infinite_h_is_no_bound() -> None:
    known = known_qp(5, 1, 4, active=0.5, seed=2)
    Q, p, A, b, G, h = known.data
    assert h is not None
    far = torch.where(known.active, h, torch.inf).requires_grad_()
    solution = solve_qp(Q, p, A, b, G, far)
    assert (solution.x - known.x).abs().max() < 1e-12
    assert torch.isfinite(torch.autograd.grad(solution.x.sum(), far)[0]).all()
