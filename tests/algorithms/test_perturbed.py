"""PerturbedOptimizer: identities (Gumbel argmax is softmax), signs of minimisers, Jacobians as in the paper."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import newton_plugin as npl
from newton_plugin import _errors as errors
from newton_plugin.algorithms import PerturbedOptimizer, StochasticSmoothing
from newton_plugin.algorithms._black_box import perturbed
from newton_plugin.algorithms._black_box.noise import resolve_noise
from newton_plugin.algorithms._black_box.smoothing import ESTIMATORS

both_signs = pytest.mark.parametrize("minimize", [False, True])
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=_seeded(seed), dtype=torch.float64)


def highest(scores: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1])


def lowest(costs: Tensor) -> Tensor:
    return highest(-costs)


def ranks(scores: Tensor) -> Tensor:
    """Largest inner product with the scores over all orders of 0..n-1."""
    return scores.argsort(-1).argsort(-1)


def best_assignment(rewards: Tensor) -> Tensor:
    """The permutation matrix of largest inner product, by scipy: what a user's black box looks like."""
    optimize = pytest.importorskip("scipy.optimize")
    out = torch.zeros_like(rewards)
    for k, matrix in enumerate(rewards.numpy()):
        rows, columns = optimize.linear_sum_assignment(matrix, maximize=True)
        out[k, rows, columns] = 1
    return out


def _assert_close_in_law(estimates: Tensor, expected: Tensor) -> None:
    """Independent estimates (R, ...), 4.5 standard errors."""
    error = estimates.std(0) / estimates.shape[0] ** 0.5
    assert (error < 0.15 * expected.abs().max()).all(), "too few estimates to tell"
    assert ((estimates.mean(0) - expected).abs() <= 4.5 * error + 1e-12).all()


@both_signs
def test_gumbel_argmax_is_softmax_with_all_derivatives(minimize: bool) -> None:
    y, sigma = torch.tensor([0.5, -0.2, 0.1, 0.3], dtype=torch.float64), 0.7
    w = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    sign = -1 if minimize else 1

    def exact(z: Tensor) -> Tensor:
        return torch.softmax(sign * z / sigma, -1)

    soft = PerturbedOptimizer(
        lowest if minimize else highest, samples=2, sigma=sigma, noise="gumbel", minimize=minimize, generator=_seeded()
    )
    many = y.expand(100_000, 4).clone().requires_grad_()
    p = soft(many)
    _assert_close_in_law(p.detach(), exact(y))
    (g,) = torch.autograd.grad((p * w).sum(), many, create_graph=True)
    _assert_close_in_law(g.detach(), torch.func.grad(lambda z: (exact(z) * w).sum())(y))
    (h,) = torch.autograd.grad(g[:, 0].sum(), many)
    _assert_close_in_law(h, torch.func.hessian(lambda z: (exact(z) * w).sum())(y)[0])


def test_flipped_noise_would_be_seen() -> None:
    """The other sign of asymmetric noise is no softmax: the test above can fail."""
    y = torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64).expand(200_000, 3)
    right = PerturbedOptimizer(highest, samples=2, sigma=1.0, noise="gumbel", generator=_seeded())
    wrong = PerturbedOptimizer(highest, samples=2, sigma=1.0, noise="gumbel", minimize=True, generator=_seeded())
    expected = torch.softmax(y[0], -1)
    assert (right(y).mean(0) - expected).abs().max() < 0.005
    assert (wrong(y).mean(0) - expected).abs().max() > 0.02


@both_signs
@pytest.mark.parametrize("noise", ["gaussian", "gumbel", "cauchy"])
def test_the_jacobian_is_the_papers(minimize: bool, noise: str) -> None:
    """``mean (p - b) s' / sigma`` for ``y + sigma e``, with the opposite sign for ``y - sigma e``."""
    y, sigma, k = _randn(2, 3, seed=1), 0.5, 6
    solver = (lambda c: ranks(-c)) if minimize else ranks
    soft = PerturbedOptimizer(
        solver, samples=k, sigma=sigma, noise=noise, minimize=minimize, baseline="none", generator=_seeded()
    )
    got = torch.func.jacrev(soft)(y)
    e = resolve_noise(noise).sample(torch.empty(k, 2, 3, dtype=torch.float64), _seeded())
    score = {
        "gaussian": e,
        "gumbel": 1 - torch.exp(-e - 0.5772156649015329),
        "cauchy": 2 * e / (1 + e**2),
    }[noise]
    sign = -1 if minimize else 1
    p = torch.stack([solver(y + sign * sigma * e[j]) for j in range(k)]).double()
    for i in range(2):
        expected = sum(torch.outer(p[j, i], score[j, i]) for j in range(k)) * sign / sigma / k
        torch.testing.assert_close(got[i, :, i], expected)
        assert (got[i, :, 1 - i] == 0).all()


@both_signs
@pytest.mark.parametrize("noise", ["gaussian", "gumbel", "cauchy"])
def test_the_symmetric_score_is_the_mean_of_j_and_its_transpose(minimize: bool, noise: str) -> None:
    """And second derivatives: the mean of the tensor, ``c_i S_jl``, and of its turns, ``(S_ij c_l + S_il c_j) / 2``."""
    y = _randn(1, 3, seed=1)
    first, second = [], []
    for estimator in ("score", "symmetric_score"):
        soft = PerturbedOptimizer(
            (lambda c: ranks(-c)) if minimize else ranks,
            samples=6,
            sigma=0.5,
            noise=noise,
            minimize=minimize,
            estimator=estimator,
            generator=_seeded(),
        )
        first.append(torch.func.jacrev(soft)(y).squeeze())
        soft._smoother.box.generator = _seeded()
        second.append(torch.func.hessian(soft)(y).squeeze())
    torch.testing.assert_close(first[1], (first[0] + first[0].mT) / 2)
    t = second[0]
    turned = (t.permute(2, 0, 1) + t.permute(2, 1, 0)) / 2
    torch.testing.assert_close(second[1], (t + (turned + turned.transpose(1, 2)) / 2) / 2)


@both_signs
@every_estimator
def test_a_solution_moves_towards_where_it_is_rewarded(minimize: bool, estimator: str) -> None:
    """d<P, t>/dy along t is positive for a maximiser, negative for a minimiser: for a cost, the path avoids it."""
    solver = (lambda c: best_assignment(-c)) if minimize else best_assignment
    soft = PerturbedOptimizer(
        solver, samples=400, sigma=0.5, minimize=minimize, estimator=estimator, generator=_seeded()
    )
    y = (0.3 * _randn(1, 3, 3)).requires_grad_()
    (g,) = torch.autograd.grad(soft(y)[0, 0, 0], y)
    assert g.abs().max() == g[0, 0, 0].abs()
    assert (g[0, 0, 0] > 0) != minimize


@every_estimator
def test_the_jacobian_is_symmetric_in_the_limit(estimator: str) -> None:
    soft = PerturbedOptimizer(ranks, samples=40_000, sigma=0.8, estimator=estimator, width=0.3, generator=_seeded())
    jacobian = torch.func.jacrev(soft)(_randn(1, 3)).squeeze()
    assert (jacobian - jacobian.mT).abs().max() < 0.05 * jacobian.abs().max()
    assert jacobian.sum(-1).abs().max() < 0.06 * jacobian.abs().max()  # ranks do not change with all scores together


def test_all_estimators_have_the_same_limit() -> None:
    y, w = 0.5 * _randn(1, 3, 3, seed=2), _randn(1, 3, 3, seed=3)
    gradients = []
    for estimator, width in (("score", 1.0), ("symmetric_score", 1.0), ("finite_difference", 0.3)):
        soft = PerturbedOptimizer(
            best_assignment, samples=5000, sigma=0.6, estimator=estimator, width=width, generator=_seeded()
        )
        gradients.append(torch.func.grad(lambda z, soft=soft: (soft(z) * w).sum())(y))
    torch.testing.assert_close(gradients[0], gradients[1], atol=0.08, rtol=0)
    torch.testing.assert_close(gradients[0], gradients[2], atol=0.08, rtol=0)
    assert gradients[0].norm() > 0.5


@settings(deadline=None, derandomize=True, max_examples=10)
@given(st.floats(-100, 100), st.integers(0, 3))
def test_invariances(shift: float, seed: int) -> None:
    """A shift of all scores changes no solution; nor do scores and sigma scaled together."""
    y = _randn(3, 4, seed=seed)
    soft = [PerturbedOptimizer(ranks, samples=4, sigma=s, generator=_seeded(seed)) for s in (1.0, 1.0, 2.0**5)]
    expected = soft[0](y)
    assert torch.equal(soft[1](y + round(shift)), expected)
    assert torch.equal(soft[2](2.0**5 * y), expected)
    torch.testing.assert_close(expected.sum(-1), torch.full((3,), 6.0, dtype=torch.float64))


def test_large_scores_and_small_noise_are_the_solver() -> None:
    y = _randn(5, 4)
    for noise in ("gaussian", "gumbel"):
        soft = PerturbedOptimizer(ranks, samples=4, sigma=1e-6, noise=noise)
        assert torch.equal(soft(y), ranks(y).double())


def test_it_is_a_smoothed_solver_and_its_mean_is_over_one_call() -> None:
    y = _randn(4, 3).requires_grad_()
    calls: list[int] = []

    def solver(z: Tensor) -> Tensor:
        calls.append(len(z))
        return ranks(z)

    results = []
    for make in (PerturbedOptimizer, StochasticSmoothing):
        p = make(solver, samples=6, sigma=0.5, antithetic=True, generator=_seeded())(y)
        results.append((p.detach(), *torch.autograd.grad(p.square().sum(), y)))
    assert calls == [24, 24]
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("curvature", ["hessian", "fisher"])
@every_estimator
def test_under_a_hook(curvature: Any, estimator: str) -> None:
    """The boundary is the layer's output, and the step is that of the explicit C and g."""
    model, x = torch.nn.Linear(4, 3).double(), _randn(6, 4)
    goal = ranks(_randn(6, 3, seed=9)).double()

    def losses(y: Tensor) -> Tensor:
        soft = PerturbedOptimizer(
            lambda c: ranks(-c), samples=12, sigma=0.9, minimize=True, estimator=estimator, generator=_seeded(1)
        )
        return (soft(y) - goal).square().sum(-1)

    y = model(x).detach()
    gradient = torch.func.grad(lambda z: losses(z).sum())(y)
    c = gradient.mT @ gradient / 6
    if curvature == "hessian":
        blocks = torch.func.hessian(lambda z: losses(z).sum())(y)
        c = torch.stack([blocks[i, :, i] for i in range(6)]).mean(0)
        c = (c + c.mT) / 2
    values, vectors = torch.linalg.eigh(c)
    shifted = values + 0.5 if (values + 0.5 > 0).all() else values.abs() + 0.5
    expected = (gradient @ (vectors / shifted) @ vectors.mT / 6).mT @ x
    hook = npl.LossHook(curvature=curvature, damping=0.5)
    hook(losses(model(x)).mean()).backward()
    assert hook.diagnostics()["fallbacks"] == 0
    torch.testing.assert_close(model.weight.grad, expected)


def test_what_it_refuses() -> None:
    def make(**options: Any) -> PerturbedOptimizer:
        return PerturbedOptimizer(**{"solver": ranks, "samples": 4, "sigma": 1.0, **options})

    with pytest.raises(errors.ArgumentTypeError, match=r"solver must be callable; got str"):
        make(solver="argmax")
    with pytest.raises(errors.ArgumentError, match=r"minimize must be one of True, False; got 'yes'"):
        make(minimize="yes")
    with pytest.raises(
        errors.ShapeError, match=r"solver must return solutions shaped like its problems, \(2,\) each; "
    ):
        make(solver=lambda y: y.sum(-1))(torch.zeros(3, 2))
    with pytest.raises(errors.ShapeError, match=r"use StochasticSmoothing"):
        make(solver=lambda y: y.argmax(-1, keepdim=True))(torch.zeros(3, 2))
    with pytest.raises(errors.NonFiniteError, match=r"solver returned NaN or infinity .* e\.g\. negative costs\?"):
        make(solver=torch.log, generator=_seeded())(torch.zeros(3, 2))
    assert "minimize=True" in repr(make(minimize=True))


def test_the_code_in_the_documentation_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "black-box-solvers.md").read_text()
    (block,) = re.findall(r"<!-- run -->\n```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(block, names)
    torch.testing.assert_close(names["p"].sum(-1), torch.full((32,), 2.0), atol=1e-4, rtol=0)
    assert names["scores"].grad.norm() > 0.01


def test_examples() -> None:
    assert doctest.testmod(perturbed).failed == 0
