"""FenchelYoungLoss: cross-entropy by Gumbel noise, signs, values that are never negative, explicit Hessians."""

from __future__ import annotations

import copy
import doctest
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import newton_plugin as npl
from newton_plugin import _errors as errors
from newton_plugin.algorithms import FenchelYoungLoss, shortest_path
from newton_plugin.algorithms._black_box import fenchel_young
from newton_plugin.algorithms._black_box.noise import EULER, resolve_noise

both_signs = pytest.mark.parametrize("minimize", [False, True])


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_seeded(seed), dtype=torch.float64)


def highest(scores: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1])


def ranks(scores: Tensor) -> Tensor:
    return scores.argsort(-1).argsort(-1)


def _solver(kind: Any, minimize: bool) -> Any:
    return (lambda c: kind(-c)) if minimize else kind


def _explicit(y: Tensor, t: Tensor, sigma: float, k: int, noise: str, minimize: bool, solver: Any) -> Any:
    """Value, gradient and Hessian of each problem from seed 0, written as in the papers."""
    e = resolve_noise(noise).sample(torch.empty(k, *y.shape, dtype=torch.float64), _seeded())
    score = e if noise == "gaussian" else 1 - torch.exp(-e - EULER)
    sign = -1 if minimize else 1
    points = y + sign * sigma * e
    p = torch.stack([solver(z) for z in points]).double()
    value = sign * (points * (p - t)).sum(-1).mean(0)
    gradient = sign * (p.mean(0) - t)
    hessian = []
    for i in range(len(y)):
        h = torch.zeros(y.shape[1], y.shape[1], dtype=torch.float64)
        for j in range(k):
            baseline = (p[:, i].sum(0) - p[j, i]) / (k - 1)
            # max: H = +J = mean (p - b) s' / sigma; min: H = -J, and J itself has the sign of y - sigma e.
            h += torch.outer(p[j, i] - baseline, score[j, i]) / sigma / k
        hessian.append((h + h.mT) / 2)
    return value, gradient, torch.stack(hessian)


@both_signs
@pytest.mark.parametrize("noise", ["gaussian", "gumbel"])
def test_value_gradient_and_hessian_are_the_formulas(noise: str, minimize: bool) -> None:
    y, t, sigma = _randn(3, 4, seed=1).requires_grad_(), ranks(_randn(3, 4, seed=2)).double(), 0.7
    solver = _solver(ranks, minimize)
    loss = FenchelYoungLoss(
        solver, samples=5, sigma=sigma, noise=noise, minimize=minimize, reduction="none", generator=_seeded()
    )
    value, gradient, hessian = _explicit(y.detach(), t, sigma, 5, noise, minimize, solver)
    got = loss(y, t)
    torch.testing.assert_close(got.detach(), value)
    (g,) = torch.autograd.grad(got.sum(), y, create_graph=True)
    torch.testing.assert_close(g.detach(), gradient)
    rows = [torch.autograd.grad(g[:, j].sum(), y, retain_graph=True)[0] for j in range(4)]
    torch.testing.assert_close(torch.stack(rows, 1), hessian)


@both_signs
def test_gumbel_noise_makes_it_the_cross_entropy(minimize: bool) -> None:
    """``sigma CE(y / sigma)``: value, gradient softmax - t and Hessian (diag p - p p') / sigma."""
    y, sigma = torch.tensor([0.5, -0.2, 0.1], dtype=torch.float64), 0.7
    t = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    sign = -1 if minimize else 1

    def exact(z: Tensor) -> Tensor:
        return sigma * torch.nn.functional.cross_entropy(sign * z / sigma, t)

    loss = FenchelYoungLoss(
        _solver(highest, minimize),
        samples=2,
        sigma=sigma,
        noise="gumbel",
        minimize=minimize,
        reduction="none",
        generator=_seeded(),
    )
    many = y.expand(100_000, 3).clone().requires_grad_()
    value = loss(many, t.expand(100_000, 3))
    (g,) = torch.autograd.grad(value.sum(), many, create_graph=True)
    h = torch.stack([torch.autograd.grad(g[:, j].sum(), many, retain_graph=True)[0] for j in range(3)], 1)
    truth = (exact(y), torch.func.grad(exact)(y), torch.func.hessian(exact)(y))
    for got, expected in zip((value, g, h), truth, strict=True):
        error = got.detach().std(0) / 100_000**0.5
        assert (error < 0.01).all()
        assert ((got.detach().mean(0) - expected).abs() <= 4.5 * error).all()


@both_signs
def test_gradient_descent_finds_costs_with_the_observed_solution(minimize: bool) -> None:
    """The sign of everything: a wrong one runs away from the target."""
    solver, t = _solver(ranks, minimize), torch.tensor([[2.0, 0.0, 3.0, 1.0]])
    loss = FenchelYoungLoss(solver, samples=8, sigma=0.5, minimize=minimize, generator=_seeded())
    y = torch.zeros(1, 4, requires_grad=True)
    before = loss(y, t).item()
    optimizer = torch.optim.SGD([y], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        loss(y, t).backward()
        optimizer.step()
    assert torch.equal(solver(y).float(), t)
    assert loss(y, t).item() < 0.1 * before


@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 4), st.booleans(), st.sampled_from(["gaussian", "gumbel"]))
def test_the_value_is_never_negative(seed: int, samples: int, minimize: bool, noise: str) -> None:
    loss = FenchelYoungLoss(
        _solver(ranks, minimize),
        samples=samples,
        sigma=1.0,
        noise=noise,
        minimize=minimize,
        baseline="none",
        reduction="none",
        generator=_seeded(seed),
    )
    y, t = _randn(4, 3, seed=seed), ranks(_randn(4, 3, seed=seed + 1)).double()
    assert (loss(y, t) >= 0).all()
    certain = 1e6 * (1 if not minimize else -1) * t
    assert (loss(certain, t) == 0).all()


def test_the_value_estimates_the_loss() -> None:
    """E max <y + sigma e, p> - <y, t>, from many samples of another seed."""
    y, t = _randn(1, 3, seed=1), torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64)
    many = torch.randn(400_000, 3, generator=_seeded(7), dtype=torch.float64)
    points = y + 0.8 * many
    expected = (points * ranks(points)).sum(-1).mean() - (y * t).sum()
    got = FenchelYoungLoss(ranks, samples=100_000, sigma=0.8, generator=_seeded())(y, t)
    assert abs(got - expected) < 0.02
    assert expected > 0.5


def test_reductions_dtypes_and_shapes() -> None:
    y, t = _randn(4, 2, 3), _randn(4, 2, 3, seed=1)

    def loss(reduction: str, z: Tensor = y, **options: Any) -> Tensor:
        made = FenchelYoungLoss(torch.sign, samples=4, sigma=1.0, reduction=reduction, generator=_seeded(), **options)
        return made(z, t.reshape(z.shape))

    each = loss("none")
    assert each.shape == (4,)
    torch.testing.assert_close(loss("sum"), each.sum())
    torch.testing.assert_close(loss("mean"), each.mean())
    assert loss("none", y.reshape(24, 1)).shape == (24,)
    assert loss("none", antithetic=True, baseline="value").shape == (4,)
    half = y.half().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss("mean", half)
    assert value.dtype == torch.float32
    (g,) = torch.autograd.grad(value, half)
    assert g.dtype == torch.float16
    assert g.isfinite().all()


def test_every_way_to_differentiate_gives_the_same() -> None:
    y, t = _randn(2, 3), ranks(_randn(2, 3, seed=1))

    def loss(z: Tensor) -> Tensor:
        return FenchelYoungLoss(ranks, samples=6, sigma=0.8, generator=_seeded())(z, t)

    leaf = y.clone().requires_grad_()
    (g,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    probes = torch.eye(6, dtype=torch.float64).reshape(6, 2, 3)
    (h,) = torch.autograd.grad(g, leaf, probes, is_grads_batched=True)
    func = torch.func
    for first in (func.grad, func.jacrev, func.jacfwd):
        torch.testing.assert_close(first(loss)(y), g.detach())
    for second in (func.hessian, lambda f: func.jacfwd(func.grad(f)), lambda f: func.jacrev(func.grad(f))):
        torch.testing.assert_close(second(loss)(y).reshape(6, 2, 3), h)
    torch.testing.assert_close(h.reshape(6, 6), h.reshape(6, 6).mT)
    mapped = func.vmap(
        lambda z, u: FenchelYoungLoss(ranks, samples=6, sigma=0.8, generator=_seeded())(z[None], u[None]),
        randomness="different",
    )
    torch.testing.assert_close(mapped(y, t).mean(), loss(y))


@pytest.mark.filterwarnings("ignore:Graph break due to unsupported builtin")  # torch 2.6 says so of `eager` itself
def test_inside_a_compiled_function_it_stays_eager() -> None:
    """Its Hessian with it: a compiled region has no second derivatives."""
    y, t = _randn(3, 4).requires_grad_(), ranks(_randn(3, 4, seed=1)).double()
    grads = []
    for compiled in (False, True):
        loss = FenchelYoungLoss(
            lambda z: torch.from_numpy(z.numpy().argsort(-1).argsort(-1)), samples=4, sigma=1.0, generator=_seeded()
        )
        f = torch.compile(loss, backend="eager") if compiled else loss
        (g,) = torch.autograd.grad(f(y, t), y, create_graph=True)
        grads.append((g.detach(), *torch.autograd.grad(g.square().sum(), y)))
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0][1].norm() > 0


@both_signs
@pytest.mark.parametrize("door", ["newton_loss", "LossHook"])
@pytest.mark.parametrize("curvature", ["hessian", "fisher"])
def test_newton_steps_use_the_explicit_hessian(minimize: bool, door: str, curvature: Any) -> None:
    x, t = _randn(6, 5, seed=1), ranks(_randn(6, 3, seed=2)).double()
    model = torch.nn.Linear(5, 3).double()
    solver = _solver(ranks, minimize)
    loss = FenchelYoungLoss(solver, samples=12, sigma=0.8, minimize=minimize, generator=_seeded())
    value, g, h = _explicit(model(x).detach(), t, 0.8, 12, "gaussian", minimize, solver)
    c = h.mean(0) if curvature == "hessian" else g.mT @ g / 6
    values, vectors = torch.linalg.eigh(c)
    shifted = values + 0.3 if (values + 0.3 > 0).all() else values.abs() + 0.3
    expected = (g @ (vectors / shifted) @ vectors.mT / 6).mT @ x
    if door == "newton_loss":
        got = npl.newton_loss(loss, curvature=curvature, damping=0.3)(model(x), t)
    else:
        hook = npl.LossHook(curvature=curvature, damping=0.3)
        got = hook(loss(model(x), t))
    got.backward()
    torch.testing.assert_close(got.detach(), value.mean())
    torch.testing.assert_close(model.weight.grad, expected)


@pytest.mark.parametrize("curvature", ["hessian", "fisher", "norm"])
def test_a_network_learns_the_costs_of_paths_under_a_hook(curvature: Any) -> None:
    """The boundary is the last convolution: softplus, noise, solver and loss have no parameters and are the loss."""
    torch.manual_seed(0)
    terrain = torch.randint(0, 3, (8, 5, 5))
    images = torch.nn.functional.one_hot(terrain, 3).movedim(-1, 1).float()
    observed = shortest_path(torch.tensor([1.0, 3.0, 9.0])[terrain]).path
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.ReLU(), torch.nn.Conv2d(8, 1, 1))
    loss = FenchelYoungLoss(
        lambda c: shortest_path(c.clamp(min=0)).path, samples=16, sigma=0.3, minimize=True, generator=_seeded()
    )
    hook = npl.LossHook(curvature=curvature, module=model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        value = hook(loss(torch.nn.functional.softplus(model(images).squeeze(1)), observed))
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert [key.split(":")[0] for key in hook.state_dict()["rules"]] == ["2"]
    assert hook.diagnostics()["fallbacks"] == 0
    assert values[-1] < 0.5 * values[0]


def test_the_hessian_is_positive_in_the_limit() -> None:
    """The loss is convex: for a minimiser too."""
    for minimize in (False, True):
        loss = FenchelYoungLoss(
            _solver(ranks, minimize), samples=20_000, sigma=1.0, minimize=minimize, generator=_seeded()
        )
        h = torch.func.hessian(lambda z, loss=loss: loss(z, torch.zeros_like(z)))(_randn(1, 3)).reshape(3, 3)
        values = torch.linalg.eigvalsh(h)
        assert values[0] > -0.02 * values[-1]
        assert values[1] > 0.1 * values[-1]


def test_what_it_refuses() -> None:
    y = torch.zeros(3, 2)

    def make(**options: Any) -> FenchelYoungLoss:
        return FenchelYoungLoss(**{"solver": ranks, "samples": 4, "sigma": 1.0, **options})

    with pytest.raises(errors.ArgumentError, match=r"noise of FenchelYoungLoss must have a mean.*got Cauchy\(\)"):
        make(noise="cauchy")
    with pytest.raises(errors.ArgumentError, match=r"reduction must be one of 'mean', 'sum', 'none'; got 'max'"):
        make(reduction="max")
    with pytest.raises(errors.ArgumentTypeError, match=r"target must be a tensor of solutions; got list"):
        make()(y, [0, 1])
    with pytest.raises(
        errors.ShapeError, match=r"got \(3,\) and \(3, 2\)\. Class indices become solutions by .*one_hot"
    ):
        make()(y, torch.zeros(3, dtype=torch.long))
    with pytest.raises(errors.ShapeError, match=r"solver must return solutions shaped like its problems"):
        make(solver=lambda z: z.sum(-1))(y, y)
    with pytest.raises(errors.ArgumentError, match=r"samples must be at least 2 for baseline='leave_one_out'; got 1"):
        make(samples=1)
    assert repr(make()) == "FenchelYoungLoss(samples=4, sigma=1, noise=Gaussian(), reduction='mean')"
    assert isinstance(copy.deepcopy(make(generator=_seeded())), FenchelYoungLoss)


def test_examples() -> None:
    assert doctest.testmod(fenchel_young).failed == 0
