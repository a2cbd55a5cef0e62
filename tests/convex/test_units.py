"""Units, zeros and rounding of the data: the answers of ordinary problems do not depend on how these are written."""

from __future__ import annotations

import pytest
import torch
from tests.convex.problems import Known, known_qp, twin
from torch import Tensor

from newton_plugin.convex import Status, solve_qp

SOLVERS = ["auto", "torch"]


def t(*values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("solver", SOLVERS)
def test_two_variables_in_units_of_1e_minus_7_and_1e7(solver: str) -> None:
    """S x = (0, 2) by hand; G x - h = 2 had been called solved."""
    S = torch.diag(t(1e-7, 1e7))
    solution = solve_qp(S @ S, -S @ t(1, 3), G=t([1e-7, 1e7]), h=t(2), solver=solver)
    assert torch.allclose(S @ solution.x, t(0, 2), atol=1e-14)
    assert torch.allclose(solution.lam, t(1))
    assert solution.active.all()


def in_units(known: Known, decades: float, seed: int) -> tuple[Known, Tensor, Tensor, Tensor]:
    """The same problem with variables, equalities and inequalities in units of their own."""
    g = torch.Generator().manual_seed(seed)
    Q, p, A, b, G, h = (part for part in known.data if part is not None)
    unit, rows, more = (
        10 ** (decades * (2 * torch.rand(size, generator=g, dtype=torch.float64) - 1))
        for size in (p.shape[-1], b.shape[-1], h.shape[-1])
    )
    data = (
        Q / unit / unit[:, None],
        p / unit,
        A * rows[:, None] / unit,
        b * rows,
        G * more[:, None] / unit,
        h * more,
    )
    return Known(data, known.x * unit, known.nu / rows, known.lam / more, known.active), unit, rows, more


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("decades", [4, 8])
@pytest.mark.parametrize("batch", [None, 3])
def test_answers_and_gradients_in_any_units(batch: int | None, decades: int, solver: str) -> None:
    """Entry by entry against the dense twin in natural units."""
    for seed in range(4):
        known = known_qp(8, 2, 12, batch=batch, active=0.4, condition=100.0, seed=seed)
        scaled, unit, rows, more = in_units(known, decades, seed)
        leaves = [part.detach().clone().requires_grad_() for part in scaled.data if part is not None]
        solution = solve_qp(*leaves, solver=solver)
        assert torch.equal(solution.active, known.active)
        assert torch.allclose(solution.x / unit, known.x, rtol=1e-10, atol=1e-11)
        g = torch.Generator().manual_seed(1)
        weights = tuple(torch.randn(v.shape, generator=g, dtype=torch.float64) for v in (known.x, known.nu, known.lam))
        parts = (solution.x / unit, solution.nu * rows, solution.lam * more)
        loss = torch.stack([(w * part).sum() for w, part in zip(weights, parts, strict=True)]).sum()
        _, right = twin(known, weights)
        back = (
            1 / unit / unit[:, None], 1 / unit, rows[:, None] / unit, rows, more[:, None] / unit, more,
        )  # fmt: skip
        for ours, theirs, factor in zip(torch.autograd.grad(loss, leaves), right, back, strict=True):
            natural = ours * factor
            assert (natural - theirs).abs().max() <= 1e-9 * theirs.abs().max()


@pytest.mark.parametrize("decades", [4, 8])
def test_sparse_problems_in_any_units(decades: int) -> None:
    pytest.importorskip("scipy")
    for seed in range(4):
        known = known_qp(8, 2, 12, active=0.4, condition=100.0, seed=seed)
        scaled, unit, *_ = in_units(known, decades, seed)
        Q, p, A, b, G, h = (part for part in scaled.data if part is not None)
        p.requires_grad_()
        solution = solve_qp(Q.to_sparse(), p, A.to_sparse(), b, G.to_sparse(), h)
        assert torch.allclose(solution.x / unit, known.x, rtol=1e-9, atol=1e-10)
        weights = torch.ones_like(known.x), torch.zeros_like(known.nu), torch.zeros_like(known.lam)
        _, right = twin(known, weights)
        gradient = torch.autograd.grad((solution.x / unit).sum(), p)[0] / unit
        assert torch.allclose(gradient, right[1], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("solver", SOLVERS)
def test_diagonal_objectives_in_units_of_1e8(solver: str) -> None:
    """Q = diag(1e-8 .. 1e8) in a box around the centre: each variable by itself, x_j = clip(centre_j)."""
    g = torch.Generator().manual_seed(0)
    for _ in range(10):
        q = 10 ** (16 * torch.rand(6, generator=g, dtype=torch.float64) - 8)
        centre = 2 * torch.randn(6, generator=g, dtype=torch.float64) / q.sqrt()
        eye = torch.eye(6, dtype=torch.float64)
        bound = torch.cat((1 / q.sqrt(), 1 / q.sqrt()))
        x = solve_qp(torch.diag(q), -q * centre, G=torch.cat((eye, -eye)), h=bound, solver=solver).x
        right = torch.maximum(torch.minimum(centre, bound[:6]), -bound[:6])
        assert torch.allclose(x * q.sqrt(), right * q.sqrt(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_negative_eigenvalue_in_small_units_is_no_rounding(solver: str) -> None:
    box = torch.cat((torch.eye(2), -torch.eye(2)))
    data = (t(0, 1), None, None, box, torch.ones(4))
    assert solve_qp(torch.diag(t(1e8, -1e-4)), *data, solver=solver, on_failure="nan").status == Status.NON_CONVEX
    assert torch.allclose(solve_qp(torch.diag(t(1, -1e-17)), *data, solver=solver).x, t(0, -1), atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
class TestAnswersThatAreZero:
    def test_projection_onto_the_tip_of_a_cone(self, solver: str) -> None:
        G = t([1, 1], [1, -1])
        p = t(-1, 0).requires_grad_()
        solution = solve_qp(torch.eye(2), p, G=G, h=torch.zeros(2), solver=solver)
        assert solution.x.abs().max() < 1e-15
        assert torch.autograd.grad(solution.x.sum(), p)[0].abs().max() < 1e-15  # x stays at the tip

    def test_as_many_equalities_as_variables(self, solver: str) -> None:
        g = torch.Generator().manual_seed(0)
        A = torch.randn(5, 5, generator=g, dtype=torch.float64)
        b = torch.zeros(5, dtype=torch.float64).requires_grad_()
        x = solve_qp(torch.eye(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64), A, b, solver=solver).x
        assert x.abs().max() < 1e-15
        assert torch.allclose(torch.autograd.grad(x[0], b)[0], torch.linalg.inv(A)[0])

    def test_linear_program(self, solver: str) -> None:
        p = t(1, 2)
        x = solve_qp(torch.zeros(2, 2), p, G=-torch.eye(2), h=torch.zeros(2), solver=solver).x
        assert x.abs().max() < 1e-15

    def test_nothing_pulls(self, solver: str) -> None:
        """p = 0 and h = 0: there is no scale anywhere."""
        x = solve_qp(torch.eye(3), torch.zeros(3), G=-torch.eye(3), h=torch.zeros(3), solver=solver).x
        assert x.tolist() == [0, 0, 0]

    def test_one_zero_in_a_batch(self, solver: str) -> None:
        p = t([-1, -2], [1, 2])
        x = solve_qp(torch.eye(2), p, G=-torch.eye(2), h=torch.zeros(2), solver=solver).x
        assert torch.allclose(x, t([1, 2], [0, 0]), atol=1e-15)


def marginals(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A, b of a transport plan: all marginals, of which one is redundant."""
    g = torch.Generator().manual_seed(seed)
    A = torch.cat(
        (
            torch.kron(torch.eye(rows), torch.ones(1, columns)),
            torch.kron(torch.ones(1, rows), torch.eye(columns)),
        )
    )
    a, b = torch.rand(rows, generator=g) + 0.1, torch.rand(columns, generator=g) + 0.1
    return A, torch.cat((a / a.sum(), b / b.sum()))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equalities_that_agree_up_to_the_rounding_of_their_dtype(dtype: torch.dtype, solver: str) -> None:
    for seed in range(6):
        A, b = (part.to(dtype) for part in marginals(3, 4, seed))
        cost = torch.randn(12, generator=torch.Generator().manual_seed(seed)).to(dtype)
        data = (torch.eye(12, dtype=dtype), cost, A, b, -torch.eye(12, dtype=dtype), torch.zeros(12, dtype=dtype))
        leaves = [part.clone().requires_grad_() for part in data]
        solution = solve_qp(*leaves, solver=solver)
        eps = torch.finfo(dtype).eps
        assert (A.double() @ solution.x.double() - b.double()).abs().max() < 4 * eps
        # The same plan with one marginal less and sums that agree in float64.
        exact = b.double()
        exact[3:] *= exact[:3].sum() / exact[3:].sum()
        double = [part.double() for part in data]
        right = solve_qp(double[0], double[1], double[2][1:], exact[1:], double[4], double[5]).x
        assert (solution.x - right).abs().max() < 10 * eps
        assert all(part.isfinite().all() for part in torch.autograd.grad(solution.x.square().sum(), leaves))


@pytest.mark.parametrize("solver", SOLVERS)
def test_contradictions_beyond_rounding_are_found(solver: str) -> None:
    A, b = marginals(3, 4, 0)
    for dtype, off in ((torch.float32, 1e-4), (torch.float64, 1e-8)):
        wrong = b.to(dtype)
        wrong[3:] *= wrong[:3].sum() / wrong[3:].sum()
        wrong[0] += off
        data = (torch.eye(12, dtype=dtype), torch.zeros(12, dtype=dtype), A.to(dtype), wrong)
        assert solve_qp(*data, solver=solver, on_failure="nan").status == Status.INCONSISTENT


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("angle", [1e-5, 1e-7, 1e-9])
def test_equalities_that_hardly_differ(angle: float, solver: str) -> None:
    """x1 + x2 = 1 and x1 + (1 + angle) x2 = 1 + angle / 2: x = (1/2, 1/2), and how it moves with p: not at all."""
    A = torch.ones(2, 3, dtype=torch.float64)
    A[1, 1] += angle
    b = t(2.5, 2.5)
    b[1] += (A[1, 1] - 1) / 2
    p = t(1, 2, 3).requires_grad_()
    far = solve_qp(torch.eye(3), p, A, b, G=t([0, 0, 1]), h=t(2), solver=solver)
    assert torch.allclose(far.x[1], t(0.5)[0], atol=4e-16 / angle)
    assert far.status == Status.SOLVED
    # With x2 fixed, x1 + x3 = 2 and min |x|^2/2 + p'x: x1 - x3 = p3 - p1.
    assert torch.allclose(far.x, t(2, 0.5, 0), atol=1e-15 / angle)
    gradient = torch.autograd.grad(far.x[0], p)[0]
    assert torch.allclose(gradient, t(-0.5, 0, 0.5), atol=1e-15 / angle)
