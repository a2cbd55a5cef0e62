"""Programs with curved constraints, in force or not: which rows are active, x, and what it moves with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, vmap

from newton_plugin.convex import ConvexLayer, Status

quick = settings(deadline=None, derandomize=True, max_examples=20)

Constraint = Callable[[Tensor, Any], Tensor]
DISC: dict[str, Constraint] = {
    "norm": lambda x, t: torch.linalg.vector_norm(x)[None] - 1,
    "square": lambda x, t: (x @ x)[None] - 1,
}
shapes = st.sampled_from(sorted(DISC))
# At the centre, inside, close to the boundary on both sides, and outside; never so close that rounding decides.
radii = st.one_of(
    st.just(0.0),
    st.floats(-9, 2).map(lambda e: 10**e).filter(lambda r: abs(r - 1) > 1e-10),
    st.tuples(st.sampled_from([-1, 1]), st.floats(-9, -1)).map(lambda v: 1 + v[0] * 10 ** v[1]),
)
thetas = st.lists(st.tuples(radii, st.floats(0, 2 * math.pi)), min_size=1, max_size=4)


def points(polar: list[tuple[float, float]]) -> Tensor:
    return torch.tensor([[r * math.cos(a), r * math.sin(a)] for r, a in polar], dtype=torch.float64)


def nearest(shape: str, weight: float = 1.0, **options: Any) -> ConvexLayer:
    return ConvexLayer(lambda x, t: weight * (x - t).square().sum(), inequality=DISC[shape], variables=2, **options)


def projection(theta: Tensor) -> Tensor:
    return theta / torch.linalg.vector_norm(theta, dim=-1, keepdim=True).clamp(min=1)


def jacobian(theta: Tensor) -> Tensor:
    """Of the projection on the disc, one theta (2,)."""
    size, eye = torch.linalg.vector_norm(theta), torch.eye(2, dtype=torch.float64)
    return eye if size <= 1 else (eye - torch.outer(theta, theta) / size**2) / size


def check(layer: ConvexLayer, theta: Tensor) -> None:
    """Everything, for thetas (B, 2), some of them inside and others outside."""
    solution = layer.solve(theta, in_dims=0)
    assert not solution.status.any()
    assert torch.allclose(solution.x, projection(theta), rtol=0, atol=1e-11)
    assert float(solution.lam.min()) >= -1e-12
    outside = torch.linalg.vector_norm(theta, dim=-1) > 1
    assert torch.equal(solution.active.squeeze(-1), outside)
    jacobians = vmap(jacrev(layer))(theta)
    assert torch.allclose(jacobians, torch.stack([jacobian(t) for t in theta]), rtol=1e-8, atol=1e-8)
    # A batch is its problems.
    leaf = theta.clone().requires_grad_()
    w = torch.tensor([0.3, -0.7], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((layer(leaf, in_dims=0) @ w).sum(), leaf)
    assert torch.allclose(gradient, w @ jacobians, rtol=1e-10, atol=1e-12)


@given(polar=thetas, shape=shapes, weight=st.sampled_from([1.0, 1e-4, 1e6]))
@quick
def test_the_nearest_point_of_a_disc(polar: list[tuple[float, float]], shape: str, weight: float) -> None:
    layer, theta = nearest(shape, weight), points(polar)
    if weight == 1.0:
        check(layer, theta)
    else:  # the unit of the objective says nothing
        assert torch.allclose(layer(theta, in_dims=0), projection(theta), rtol=0, atol=1e-8)


@given(polar=thetas, shape=shapes, off=st.sampled_from([0.0, 1e-6, 1e-3]))
@quick
def test_with_a_solver_of_ones_own(polar: list[tuple[float, float]], shape: str, off: float) -> None:
    """Its multipliers are a little off too: not zero where the row is not active."""

    def solver(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pull = 2 * (torch.linalg.vector_norm(theta) - 1).clamp(min=0) / (1 if shape == "norm" else 2)
        return projection(theta) + off, theta[:0], pull[None] + 1e-3 * off

    check(nearest(shape, solver=solver), points(polar))


@pytest.mark.parametrize("shape", sorted(DISC))
@pytest.mark.parametrize("theta", [(0.0, 0.0), (1e-9, 0.0), (0.3, 0.1), (0.9, 0.0), (1.0, 0.0), (0.6, 0.8)])
def test_inside_all_derivatives_are_those_of_theta(shape: str, theta: tuple[float, float]) -> None:
    """At the centre too, where the norm has a kink that is not in force; on the boundary by the one-sided rule."""
    layer, at = nearest(shape), torch.tensor(theta, dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    assert torch.allclose(jacrev(layer)(at), eye, atol=1e-12)
    assert torch.allclose(jacfwd(layer)(at), eye, atol=1e-12)
    assert float(hessian(layer)(at).abs().max()) < 1e-12


def test_the_example_of_the_docstring_by_finite_differences() -> None:
    layer = nearest("norm")
    for theta in ((0.3, 0.1), (0.9, 0.0), (3.0, 4.0), (-1.5, 0.2)):
        leaf = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(layer, leaf)
        assert torch.autograd.gradgradcheck(layer, leaf)


def test_an_ellipsoid_that_moves() -> None:
    """``|(x - c) / a| <= 1`` with its half-axes a: inside x is theta, outside all gradients are finite differences."""
    layer = ConvexLayer(
        lambda x, t: (x - t["point"]).square().sum(),
        inequality=lambda x, t: ((x - t["centre"]) / t["axes"]).square().sum()[None] - 1,
        variables=3,
    )
    centre = torch.tensor([0.2, -0.1, 0.3], dtype=torch.float64, requires_grad=True)
    axes = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    for point, inside in (((1.5, 0.0, 0.2), True), ((0.2, -0.1, 0.3), True), ((1.5, 0.6, 0.2), False)):
        p = torch.tensor(point, dtype=torch.float64, requires_grad=True)
        solution = layer.solve({"point": p, "centre": centre, "axes": axes})
        assert solution.active.tolist() == [not inside]
        assert not inside or torch.allclose(solution.x, p, atol=1e-12)
        assert torch.autograd.gradcheck(lambda p, c, a: layer({"point": p, "centre": c, "axes": a}), (p, centre, axes))


@pytest.mark.parametrize("x1", [1.5, -1.5, 0.0])
def test_of_two_discs_only_one_holds(x1: float) -> None:
    """The lens between (-0.5, 0) and (0.5, 0): from (1.5, y) the left disc's edge is nearest; from its tip both are."""
    half = torch.tensor([0.5, 0.0], dtype=torch.float64)
    layer = ConvexLayer(
        lambda x, t: (x - t).square().sum(),
        inequality=lambda x, t: torch.stack(
            [torch.linalg.vector_norm(x + half) - 1, torch.linalg.vector_norm(x - half) - 1]
        ),
        variables=2,
    )
    theta = torch.tensor([x1, 0.1 if x1 else 3.0], dtype=torch.float64, requires_grad=True)
    solution = layer.solve(theta)
    assert solution.active.tolist() == [x1 >= 0, x1 <= 0]
    assert float(solution.lam.detach().min()) >= 0
    if x1:
        side = math.copysign(1, x1) * half
        assert torch.allclose(solution.x, projection(theta + side) - side, atol=1e-12)
    else:
        assert torch.allclose(solution.x, torch.tensor([0.0, 0.75**0.5], dtype=torch.float64), atol=1e-12)
    assert torch.autograd.gradcheck(layer, theta)


def test_a_kink_beside_an_active_row_is_no_silent_zero() -> None:
    """Second derivatives do not exist there for torch, so there is no K to solve with: a status, not a derivative."""
    layer = ConvexLayer(
        lambda x, t: (x - t).square().sum(),
        inequality=lambda x, t: torch.cat([torch.linalg.vector_norm(x)[None] - 1, x[:1]]),
        variables=2,
        on_failure="nan",
    )
    solution = layer.solve(torch.tensor([[1.0, 0.0], [1.0, 0.1]], dtype=torch.float64), in_dims=0)
    assert solution.status.tolist() == [Status.NOT_CONVERGED, Status.SOLVED]
    assert solution.active[1].tolist() == [False, True]
