"""The hypergradient against closed forms, its solvers against each other, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.bilevel.closed_forms import PROBLEMS, Problem, quadratic, softmax_cleaning, weighted_least_squares
from torch import Tensor

from newton_plugin import ArgumentError, ArgumentTypeError, NoGradientError, ShapeError, SingularCurvatureError
from newton_plugin.bilevel import DoubleBackwardError, NotConvergedError, hypergradient

every_problem = pytest.mark.parametrize("make", PROBLEMS, ids=lambda f: f.__name__)


def _of(problem: Problem, **kwargs) -> tuple[Tensor, ...]:
    return hypergradient(problem.upper_closure, problem.lower_closure, problem.upper, problem.lower, **kwargs)


def _assert_near(found: tuple[Tensor, ...], expected: list[Tensor], tolerance: float) -> None:
    size = max(e.abs().max() for e in expected)
    assert size > 1e-3
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape
        assert not f.requires_grad
        torch.testing.assert_close(f, e, rtol=0, atol=tolerance * float(size))


@every_problem
@pytest.mark.parametrize("solver", ["cg", "linear"])
def test_closed_forms_to_ten_digits(make, solver: str) -> None:
    problem = make()
    _assert_near(_of(problem, solver=solver), problem.expected, 1e-10)


@every_problem
def test_a_long_neumann_series_is_the_closed_form(make) -> None:
    problem = make()
    _assert_near(_of(problem, solver="neumann", terms=1500), problem.expected, 1e-10)


@every_problem
@pytest.mark.parametrize("solver", ["cg", "linear"])
def test_finite_differences_to_seven_digits(make, solver: str) -> None:
    problem = make()
    before = [p.detach().clone() for p in [*problem.upper, *problem.lower]]
    _assert_near(_of(problem, solver=solver, hvp="finite_difference"), problem.expected, 1e-7)
    for p, b in zip([*problem.upper, *problem.lower], before, strict=True):
        assert torch.equal(p, b)


def _hessian_blocks(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """D2_yy G, D2_xy G, grad_x F and grad_y F, dense, row by row."""
    tensors = [*problem.upper, *problem.lower]
    k = sum(p.numel() for p in problem.upper)
    zero = sum((0.0 * p.sum() for p in tensors), torch.zeros((), dtype=torch.float64))
    gradient = torch.autograd.grad(problem.lower_closure() + zero, tensors, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = []
    for entry in flat:
        row = torch.autograd.grad(entry, tensors, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat([torch.zeros_like(p).flatten() if r is None else r.flatten() for r, p in zip(row, tensors)])  # noqa: B905
        )
    full = torch.stack(rows).detach()
    above = torch.autograd.grad(problem.upper_closure() + zero, tensors)
    above = torch.cat([g.flatten() for g in above])
    return full[k:, k:], full[:k, k:], above[:k], above[k:]


@pytest.mark.parametrize("make", [quadratic, weighted_least_squares, softmax_cleaning], ids=lambda f: f.__name__)
@pytest.mark.parametrize("terms", [1, 3, 10, 100])
def test_neumann_partial_sums_are_the_explicit_series(make, terms: int) -> None:
    problem = make()
    hessian, mixed, gx, gy = _hessian_blocks(problem)
    s = 0.9 / float(torch.linalg.eigvalsh(hessian)[-1])
    contraction = torch.eye(len(gy), dtype=torch.float64) - s * hessian
    series = sum(s * torch.linalg.matrix_power(contraction, q) @ gy for q in range(terms))
    expected = (gx - mixed @ series).split([p.numel() for p in problem.upper])
    found = _of(problem, solver="neumann", terms=terms, scale=s)
    _assert_near(found, [e.reshape(p.shape) for e, p in zip(expected, problem.upper, strict=True)], 1e-12)


def test_truncated_cg_and_linear_give_what_so_many_iterations_give() -> None:
    """CG after k iterations is the best of the Krylov space; the plain iteration is the series."""
    problem = quadratic()
    hessian, mixed, gx, gy = _hessian_blocks(problem)
    krylov = torch.stack([torch.linalg.matrix_power(hessian, q) @ gy for q in range(3)], 1)
    best = krylov @ torch.linalg.solve(krylov.T @ hessian @ krylov, krylov.T @ gy)
    _assert_near(_of(problem, solver="cg", terms=3), [gx - mixed @ best], 1e-9)
    linear = _of(problem, solver="linear", terms=4, scale=0.01)
    neumann = _of(problem, solver="neumann", terms=4, scale=0.01)
    assert torch.equal(linear[0], neumann[0])


@settings(deadline=None, derandomize=True, max_examples=15)
@given(
    a=st.floats(0.01, 100),
    c=st.floats(0.01, 100),
    solver=st.sampled_from(["cg", "linear"]),
    make=st.sampled_from([quadratic, softmax_cleaning]),
)
def test_scaling_a_loss(a: float, c: float, solver: str, make) -> None:
    """h is linear in F and does not change when G is multiplied: its minimum does not."""
    problem = make()
    found = hypergradient(
        lambda: a * problem.upper_closure(),
        lambda: c * problem.lower_closure(),
        problem.upper,
        problem.lower,
        solver=solver,
    )
    _assert_near(found, [a * e for e in problem.expected], 1e-9)


def test_parameters_gradients_and_random_numbers_are_left_alone() -> None:
    problem = softmax_cleaning()
    for p in [*problem.upper, *problem.lower]:
        p.grad = torch.full_like(p, 7.0)
    before = [p.detach().clone() for p in [*problem.upper, *problem.lower]]
    state = torch.get_rng_state()
    _of(problem)
    _of(problem, solver="neumann")
    _of(problem, hvp="finite_difference")
    assert torch.equal(torch.get_rng_state(), state)
    for p, b in zip([*problem.upper, *problem.lower], before, strict=True):
        assert torch.equal(p, b)
        assert torch.equal(p.grad, torch.full_like(p, 7.0))


def test_float32_and_generators() -> None:
    model, weights = torch.nn.Linear(3, 1), torch.zeros(5, requires_grad=True)
    torch.manual_seed(0)
    z, u = torch.randn(5, 3), torch.randn(5)

    def lower() -> Tensor:
        weighted = weights.exp() * (model(z).squeeze(-1) - u).square()
        return weighted.mean() + 0.1 * sum(p.square().sum() for p in model.parameters())

    def upper() -> Tensor:
        return model(z).square().mean()

    found = hypergradient(upper, lower, (w for w in [weights]), model.parameters())
    assert found[0].dtype == torch.float32
    named = hypergradient(upper, lower, [weights], model.named_parameters())
    assert torch.equal(found[0], named[0])
    numeric = hypergradient(upper, lower, [weights], model.parameters(), hvp="finite_difference", tol=1e-3)
    torch.testing.assert_close(numeric[0], found[0], rtol=1e-2, atol=1e-3 * float(found[0].abs().max()))


def test_an_upper_parameter_that_only_one_loss_sees() -> None:
    x, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    y = torch.ones(2, requires_grad=True)
    found = hypergradient(lambda: y.sum(), lambda: (y - x).square().sum(), [x, unused], [y])
    torch.testing.assert_close(found[0], torch.ones(2))  # y* = x
    assert torch.equal(found[1], torch.zeros(3))
    direct = hypergradient(lambda: (x * y).sum(), lambda: y.square().sum(), [x], [y])
    torch.testing.assert_close(direct[0], torch.ones(2))


class _Once(torch.autograd.Function):
    """Squares, with a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        return y.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


def test_operations_without_a_second_derivative() -> None:
    x, y = (
        torch.ones(2, dtype=torch.float64, requires_grad=True),
        torch.ones(2, dtype=torch.float64, requires_grad=True),
    )

    def lower() -> Tensor:
        return _Once.apply(y - x).exp().sum()

    with pytest.raises(DoubleBackwardError, match='hvp="finite_difference"'):
        hypergradient(lambda: y.sum(), lower, [x], [y])
    found = hypergradient(lambda: y.sum(), lower, [x], [y], hvp="finite_difference")
    torch.testing.assert_close(found[0], torch.ones(2, dtype=torch.float64))


def _pair() -> tuple[Tensor, Tensor]:
    return torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)


def test_what_a_lower_loss_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _pair()
    with pytest.raises(SingularCurvatureError, match="linear in lower_params"):
        hypergradient(lambda: y.sum(), lambda: (x * y).sum(), [x], [y])
    with pytest.raises(SingularCurvatureError, match="not positive definite"):
        hypergradient(lambda: y.sum(), lambda: (x * y).sum() - y.square().sum(), [x], [y])
    stopped = hypergradient(lambda: y.sum(), lambda: (x * y).sum() - y.square().sum(), [x], [y], terms=5)
    assert torch.equal(stopped[0], torch.zeros(2))
    flat = torch.tensor([1.0, 1e-9])
    monkeypatch.setattr("newton_plugin.bilevel._hypergradient.hypergradient._LINEAR_LIMIT", 50)
    with pytest.raises(NotConvergedError, match="add weight decay"):
        hypergradient(lambda: y.sum(), lambda: (x * y + flat * y.square()).sum(), [x], [y], solver="linear")


def test_losses_that_do_not_depend_on_what_they_should() -> None:
    x, y = _pair()

    def fine() -> Tensor:
        return (y - x).square().sum()

    for upper, lower, message in [
        (lambda: y.detach().sum(), fine, "upper_closure returned has no autograd graph"),
        (lambda: x.sum(), fine, "upper_closure returned does not depend on lower_params"),
        (lambda: y.sum(), lambda: fine().detach(), "lower_closure returned has no autograd graph"),
        (lambda: y.sum(), lambda: x.square().sum(), "lower_closure returned does not depend on lower_params"),
        (lambda: y.sum(), lambda: (y - x.detach()).square().sum(), "neither loss depends on upper_params"),
    ]:
        for hvp in ("autograd", "finite_difference"):
            with pytest.raises(NoGradientError, match=message):
                hypergradient(upper, lower, [x], [y], hvp=hvp)


def test_arguments() -> None:
    x, y = _pair()

    def upper() -> Tensor:
        return y.sum()

    def lower() -> Tensor:
        return (y - x).square().sum()

    for kwargs, message in [
        ({"solver": "lu"}, "solver must be one of 'cg', 'neumann', 'linear'"),
        ({"hvp": "exact"}, "hvp must be one of"),
        ({"terms": 0}, "terms must be at least 1"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"tol": 0.0}, "tol must be positive"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            hypergradient(upper, lower, [x], [y], **kwargs)
    with pytest.raises(ArgumentTypeError, match="terms must be a positive integer"):
        hypergradient(upper, lower, [x], [y], terms=2.0)
    with pytest.raises(ArgumentTypeError, match=r"Write \[upper_params\]"):
        hypergradient(upper, lower, x, [y])
    with pytest.raises(ArgumentError, match="lower_params is empty"):
        hypergradient(upper, lower, [x], [])
    with pytest.raises(ArgumentError, match="in upper_params and in lower_params"):
        hypergradient(upper, lower, [x], [y, x])
    with pytest.raises(ArgumentError, match="the same tensor twice"):
        hypergradient(upper, lower, [x, x], [y])
    with pytest.raises(ArgumentError, match="does not require grad"):
        hypergradient(upper, lower, [x], [torch.ones(2)])
    with pytest.raises(ArgumentTypeError, match="must hold tensors; got str"):
        hypergradient(upper, lower, [x], ["y"])
    with pytest.raises(ArgumentTypeError, match="upper_closure must be a function"):
        hypergradient(upper(), lower, [x], [y])
    with pytest.raises(ArgumentTypeError, match="lower_closure must return the loss"):
        hypergradient(upper, lambda: 1.0, [x], [y])
    with pytest.raises(ShapeError, match="lower_closure must return one number"):
        hypergradient(upper, lambda: y - x, [x], [y])
