"""Programs written as functions: against solve_qp, closed forms, and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.convex.problems import known_qp
from torch import Tensor
from torch.func import grad, hessian, jacrev, vmap

from newton_plugin import ArgumentError, ArgumentTypeError, NewtonPluginError, ShapeError
from newton_plugin.convex import ConvexLayer, NonUniqueSolutionWarning, ProblemFailedError, Status, solve_qp

N = 4


def qp_layer(**options: Any) -> ConvexLayer:
    return ConvexLayer(
        lambda x, t: 0.5 * x @ t["Q"] @ x + t["p"] @ x,
        lambda x, t: t["A"] @ x - t["b"],
        lambda x, t: t["G"] @ x - t["h"],
        variables=N,
        **options,
    )


def qp_data(seed: int = 0) -> dict[str, Tensor]:
    known = known_qp(N, 1, 5, active=0.4, condition=10.0, seed=seed)
    return {name: t for name, t in zip("QpAbGh", known.data, strict=True) if t is not None}


def test_a_quadratic_program_is_solve_qp() -> None:
    data = qp_data()
    ours, theirs = qp_layer().solve(data), solve_qp(**data)
    for a, b in zip(ours[:3], (theirs.x, theirs.nu, theirs.lam), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-11)
    assert torch.equal(ours.active, theirs.active)
    first = grad(lambda t: (qp_layer()(t) ** 3).sum())(data)
    second = grad(lambda t: (solve_qp(**t).x ** 3).sum())(data)
    first["Q"] = 0.5 * (first["Q"] + first["Q"].mT)
    for name in data:
        assert torch.allclose(first[name], second[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["p", "G", "h"])
def test_second_derivatives_are_those_of_solve_qp(name: str) -> None:
    data = qp_data(1)
    layer = qp_layer()
    ours = hessian(lambda v: (layer({**data, name: v}) ** 3).sum())(data[name])
    theirs = hessian(lambda v: (solve_qp(**{**data, name: v}).x ** 3).sum())(data[name])
    assert (ours - theirs).abs().max() < 1e-9 * theirs.abs().max()


def test_a_batch_by_in_dims_and_by_vmap() -> None:
    data, layer = qp_data(2), qp_layer()
    ps = torch.randn(3, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dims: dict[str, int | None] = dict.fromkeys(data)
    dims["p"] = 0
    x = layer({**data, "p": ps}, in_dims=dims)
    reference = torch.stack([layer({**data, "p": p}) for p in ps])
    assert torch.allclose(x, reference, rtol=1e-10)
    assert torch.allclose(vmap(lambda p: layer({**data, "p": p}))(ps), reference, rtol=1e-10)

    def loss(p: Tensor) -> Tensor:
        return (layer({**data, "p": p}) ** 2).sum()

    mapped = vmap(grad(loss))(ps)
    assert torch.allclose(mapped, torch.stack([grad(loss)(p) for p in ps]), rtol=1e-9, atol=1e-12)


def test_entropy_gives_softmax() -> None:
    """argmin c'x + sum x log x on the simplex is softmax(-c), and so are its first and second derivatives."""
    layer = ConvexLayer(
        lambda x, c: c @ x + (x * x.log()).sum(),
        lambda x, c: x.sum()[None] - 1,
        variables=3,
        start=torch.full((3,), 0.3),
    )
    c = torch.tensor([0.3, -1.0, 0.7], dtype=torch.float64)
    softmax = lambda c: torch.softmax(-c, -1)  # noqa: E731
    assert torch.allclose(layer(c), softmax(c), rtol=1e-10)
    assert torch.allclose(jacrev(layer)(c), jacrev(softmax)(c), rtol=1e-9)
    assert torch.allclose(hessian(lambda c: layer(c)[0])(c), hessian(lambda c: softmax(c)[0])(c), rtol=1e-8, atol=1e-12)


def test_linear_program() -> None:
    layer = ConvexLayer(lambda x, c: c @ x, lambda x, c: x.sum()[None] - 1, lambda x, c: -x, variables=3)
    c = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    solution = layer.solve(c)
    assert torch.allclose(solution.x, torch.tensor([1.0, 0, 0], dtype=torch.float64), atol=1e-10)
    assert torch.allclose(solution.lam, torch.tensor([0.0, 1, 2], dtype=torch.float64), atol=1e-10)
    assert jacrev(layer)(c).abs().max() < 1e-12
    with pytest.warns(NonUniqueSolutionWarning):
        layer(torch.ones(3, dtype=torch.float64))


class TestSecondOrderCones:
    layer = ConvexLayer(
        lambda x, c: -(c @ x),
        None,
        lambda x, c: torch.stack([torch.linalg.vector_norm(x[:2]) - x[2], x[2] - 1]),
        variables=3,
    )

    def test_the_point_of_a_cone(self) -> None:
        """The cone |(x, y)| <= z <= 1, in the direction (3, 4, -1): the normalised (3, 4), and z = 1."""
        c = torch.tensor([3.0, 4.0, -1.0], dtype=torch.float64)
        solution = self.layer.solve(c)
        assert torch.allclose(solution.x, torch.tensor([0.6, 0.8, 1.0], dtype=torch.float64), rtol=1e-10)
        assert torch.allclose(solution.lam, torch.tensor([5.0, 4.0], dtype=torch.float64), rtol=1e-10)

    def test_signs_of_the_derivative(self) -> None:
        c = torch.tensor([3.0, 4.0, -1.0], dtype=torch.float64, requires_grad=True)
        jacobian = jacrev(self.layer)(c.detach())
        unit = torch.tensor([0.6, 0.8], dtype=torch.float64)
        expected = (torch.eye(2, dtype=torch.float64) - torch.outer(unit, unit)) / 5  # of c / |c|
        assert torch.allclose(jacobian[:2, :2], expected, rtol=1e-9, atol=1e-12)
        assert torch.autograd.gradcheck(self.layer, c)
        assert torch.autograd.gradgradcheck(self.layer, c, fast_mode=True)

    def test_robust_least_squares(self) -> None:
        """min |Ax - b| + rho |x| as a cone program with two cones: all gradients by finite differences."""
        layer = ConvexLayer(
            lambda z, t: z[2] + 0.3 * z[3],
            None,
            lambda z, t: torch.stack(
                [
                    torch.linalg.vector_norm(t[0] @ z[:2] - t[1]) - z[2],
                    torch.linalg.vector_norm(z[:2]) - z[3],
                ]
            ),
            variables=4,
        )
        g = torch.Generator().manual_seed(1)
        A = torch.randn(4, 2, generator=g, dtype=torch.float64, requires_grad=True)
        b = torch.randn(4, generator=g, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda A, b: layer((A, b)), (A, b), fast_mode=True)


def test_own_solver_of_low_accuracy() -> None:
    data = qp_data(3)
    exact = solve_qp(**data)
    layer = qp_layer(solver=lambda theta: (exact.x + 1e-3, exact.nu, exact.lam * 0.99))
    assert torch.allclose(layer(data), exact.x, rtol=1e-10)


FAILING = {
    "infeasible": lambda x, t: torch.stack([x[0] + 1, 1 - x[0]]),
    "unbounded": lambda x, t: x - 1,
}


@pytest.mark.parametrize("word", FAILING)
def test_failures_have_a_status(word: str) -> None:
    layer = ConvexLayer(lambda x, t: t * x.sum(), None, FAILING[word], variables=1)
    with pytest.raises(ProblemFailedError, match=word):
        layer(torch.ones(()))


class TestElementsOfABatch:
    """min t_0/2 |x|^2 + t_1 sum x: quadratic, linear, constant. Each element has its own status."""

    theta = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [2.0, 1.0]], dtype=torch.float64)

    @staticmethod
    def layer(**rows: Any) -> ConvexLayer:
        return ConvexLayer(lambda x, t: 0.5 * t[0] * x @ x + t[1] * x.sum(), **rows, variables=2, on_failure="nan")

    @pytest.mark.filterwarnings("ignore::newton_plugin.convex.NonUniqueSolutionWarning")
    def test_without_constraints(self) -> None:
        layer = self.layer()
        theta = self.theta.clone().requires_grad_()
        solution = layer.solve(theta, in_dims=0)
        assert solution.status.tolist() == [Status.SOLVED, Status.UNBOUNDED, Status.SOLVED, Status.SOLVED]
        expected = torch.tensor([[-1.0, -1.0], [-0.5, -0.5]], dtype=torch.float64)
        assert torch.allclose(solution.x[[0, 3]], expected, rtol=1e-12)
        assert solution.x[1].isnan().all()
        assert solution.x[2].isfinite().all()  # any point is a minimiser
        slopes = torch.autograd.grad(solution.x[[0, 3]].sum(), theta)[0]
        assert torch.allclose(slopes[[0, 3]], torch.tensor([[2.0, -2.0], [0.5, -1.0]], dtype=torch.float64))
        for i in range(4):
            alone = layer.solve(self.theta[i])
            assert alone.status.item() == solution.status[i].item()
            assert torch.allclose(alone.x, solution.x[i], rtol=1e-12, equal_nan=True)

    def test_what_is_not_unique_is_said(self) -> None:
        with pytest.warns(NonUniqueSolutionWarning, match=r"batch index 2.*quadratic term in the objective makes"):
            self.layer().solve(self.theta, in_dims=0)

    @pytest.mark.filterwarnings("ignore::newton_plugin.convex.NonUniqueSolutionWarning")
    def test_on_a_line(self) -> None:
        """sum x = 1: the linear and the constant objective are constant there."""
        solution = self.layer(equality=lambda x, t: x.sum()[None] - 1).solve(self.theta, in_dims=0)
        assert not solution.status.any()
        assert torch.allclose(solution.x.sum(-1), torch.ones(4, dtype=torch.float64), rtol=1e-12)
        assert torch.allclose(solution.x[[0, 3]], torch.full((2, 2), 0.5, dtype=torch.float64), rtol=1e-12)
        assert torch.allclose(solution.nu[:, 0], torch.tensor([-1.5, -1.0, 0.0, -2.0], dtype=torch.float64), atol=1e-12)

    def test_unbounded_along_a_line(self) -> None:
        layer = ConvexLayer(lambda x, t: t @ x, lambda x, t: x.sum()[None] - 1, variables=2, on_failure="nan")
        assert layer.solve(torch.tensor([1.0, -1.0])).status.item() == Status.UNBOUNDED

    @pytest.mark.filterwarnings("ignore::newton_plugin.convex.NonUniqueSolutionWarning")
    def test_an_own_solver_of_a_linear_objective(self) -> None:
        none = torch.zeros(0)
        layer = self.layer(solver=lambda t: (torch.zeros(2), none, none))
        assert layer.solve(self.theta, in_dims=0).status.tolist() == [0, Status.NOT_CONVERGED, 0, 0]


UNDEFINED = {
    "objective": ConvexLayer(lambda x, t: t * x.sum() - x.log().sum(), variables=4),
    "its curvature": ConvexLayer(lambda x, t: (x**1.5).sum() + t * x.sum(), variables=2, start=torch.zeros(2)),
    "inequality": ConvexLayer(lambda x, t: (x - t) @ x, None, lambda x, t: -(x - 2).sqrt(), variables=2),
    "equality": ConvexLayer(lambda x, t: (x - t) @ x, lambda x, t: x.sum()[None] - (t - 5).sqrt(), variables=2),
}


@pytest.mark.parametrize("what", UNDEFINED)
def test_what_is_nan_at_the_start_names_the_start(what: str) -> None:
    message = r"not finite at batch index 0, 1: .*NaN or infinite at the start: give start= inside"
    with pytest.raises(ProblemFailedError, match=message):
        UNDEFINED[what](torch.ones(2, dtype=torch.float64), in_dims=0)


def test_a_start_inside_the_domain_helps() -> None:
    layer = ConvexLayer(lambda x, t: t * x.sum() - x.log().sum(), variables=4, start=torch.ones(4))
    theta = torch.tensor(2.0, dtype=torch.float64)
    assert torch.allclose(layer(theta), torch.full((4,), 0.5, dtype=torch.float64), rtol=1e-12)  # 1 / t


def test_nan_in_theta_is_named() -> None:
    layer = ConvexLayer(lambda x, t: (x - t) @ (x - t), variables=2, on_failure="nan")
    solution = layer.solve(torch.tensor([1.0, torch.nan]), in_dims=0)
    assert solution.status.tolist() == [Status.SOLVED, Status.NOT_FINITE]
    assert solution.x[0].tolist() == [1.0, 1.0]


@pytest.mark.filterwarnings("ignore::newton_plugin.convex.NonUniqueSolutionWarning")  # of the multipliers
@pytest.mark.parametrize("boxed", [False, True])
def test_contradictory_equalities_are_named(boxed: bool) -> None:
    layer = ConvexLayer(
        lambda x, t: x @ x,
        lambda x, t: torch.stack([x.sum() - 1, 2 * x.sum() - t]),
        (lambda x, t: x - 3) if boxed else None,
        variables=2,
    )
    assert torch.allclose(layer(torch.tensor(2.0)), torch.full((2,), 0.5))
    message = r"inconsistent equalities: equality\(x, theta\) = 0 has no solution: remove"
    with pytest.raises(ProblemFailedError, match=message):
        layer(torch.tensor(2.1))


def test_infeasible_inequalities_speak_of_the_callers_function() -> None:
    layer = ConvexLayer(lambda x, t: x @ x, lambda x, t: x.sum()[None] - t, lambda x, t: x - 1, variables=2)
    with pytest.raises(ProblemFailedError, match=r"infeasible: relax inequality\(x, theta\) <= 0"):
        layer(torch.tensor(5.0))


def test_a_concave_objective_is_refused() -> None:
    layer = ConvexLayer(
        lambda x, t: -t * (x * x).sum(), None, lambda x, t: torch.cat([x - 1, -1 - x]), variables=1, on_failure="nan"
    )
    solution = layer.solve(torch.ones(()))
    assert solution.status.item() != 0
    assert solution.x.isnan().all()


BAD: dict[str, tuple[Callable[[], Any], type[NewtonPluginError], str]] = {
    "objective": (lambda: ConvexLayer(None, variables=2), ArgumentTypeError, "objective must be a function"),  # type: ignore[arg-type]
    "variables": (lambda: ConvexLayer(lambda x, t: x, variables=0), ArgumentError, "variables must be a positive"),
    "solver": (
        lambda: ConvexLayer(lambda x, t: x, variables=1, solver="ipm"),  # type: ignore[arg-type]
        ArgumentTypeError,
        "solver must be None or a callable",
    ),
    "start": (lambda: ConvexLayer(lambda x, t: x, variables=2, start=torch.ones(3)), ShapeError, "start must have"),
    "scalar": (lambda: ConvexLayer(lambda x, t: x, variables=2)(torch.ones(1)), ShapeError, "return a scalar"),
    "theta": (lambda: ConvexLayer(lambda x, t: x.sum(), variables=2)(3.0), ArgumentTypeError, "theta must be a tensor"),
    "value": (lambda: ConvexLayer(lambda x, t: 1.0, variables=2)(torch.ones(1)), ArgumentTypeError, "return a tensor"),  # type: ignore[arg-type, return-value]
}


@pytest.mark.parametrize("case", BAD)
def test_messages(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_in_inference_mode() -> None:
    data = qp_data(4)
    with torch.inference_mode():
        inside = qp_layer()({name: t.clone() for name, t in data.items()})
    assert torch.equal(inside, qp_layer()(data))
