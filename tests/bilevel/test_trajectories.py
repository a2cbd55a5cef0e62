"""Twenty steps of every method beside its dense NumPy twin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.bilevel.twins import AccBOTwin, BOREPTwin, MASOBATwin, NoisyProblem, StocBiOTwin

from newton_plugin.bilevel import BOREP, MASOBA, AccBO, StocBiO

TWINS = {AccBO: AccBOTwin, MASOBA: MASOBATwin, BOREP: BOREPTwin, StocBiO: StocBiOTwin}
CASES: list[tuple[Any, dict[str, Any]]] = [
    (AccBO, {}),
    (AccBO, {"estimator": "ema"}),
    (AccBO, {"solver": "neumann"}),
    (AccBO, {"solver": "neumann", "scale": 0.1, "terms": 3, "estimator": "ema"}),
    (AccBO, {"solver": "cg", "terms": 3}),
    (AccBO, {"scale": 0.15, "lower_steps": 3, "lower_every": 2, "gamma": 0.2, "tau": 0.9, "beta": 0.7}),
    (AccBO, {"gamma": 0.0, "tau": 1.0, "terms": 1}),
    (MASOBA, {}),
    (MASOBA, {"scale": 0.1, "beta": 0.5}),
    (BOREP, {}),
    (BOREP, {"solver": "linear", "lower_every": 3, "lower_steps": 2}),
    (BOREP, {"solver": "cg", "terms": 4, "beta": 0.0}),
    (StocBiO, {}),
    (StocBiO, {"solver": "cg", "terms": 5, "lower_steps": 2}),
    (StocBiO, {"solver": "linear", "scale": 0.1, "lower_steps": 1}),
]


@pytest.mark.parametrize(("method", "options"), CASES, ids=lambda c: getattr(c, "__name__", None) or str(c))
@pytest.mark.parametrize("split", [False, True])
def test_twenty_steps(method: Any, options: dict[str, Any], split: bool) -> None:
    """Also with every vector in two tensors: the methods know one vector per level."""
    problem = NoisyProblem()
    options = {"lr_upper": 0.05, "lr_lower": 0.1, **options}
    twin = TWINS[method](problem, **options)
    sizes = [2, 3] if split else [5]
    x = [v.clone().requires_grad_() for v in torch.from_numpy(problem.x0).split(sizes)]
    y = [v.clone().requires_grad_() for v in torch.from_numpy(problem.y0).split(sizes)]
    optimizer = method(x, y, **options)
    upper, lower = problem.closures(x, y)
    for step in range(20):
        problem.sample(step)
        twin.step()
        optimizer.step(upper, lower)
        for found, expected in ((x, twin.x), (y, twin.y)):
            np.testing.assert_allclose(torch.cat(found).detach().numpy(), expected, rtol=1e-10, atol=1e-12)
    assert np.linalg.norm(twin.x - problem.x0) > 0.1  # it went somewhere


@pytest.mark.parametrize("method", list(TWINS))
def test_finite_differences_follow(method: Any) -> None:
    problem = NoisyProblem()
    ends = []
    for hvp in ("autograd", "finite_difference"):
        x, y = [torch.tensor(problem.x0, requires_grad=True)], [torch.tensor(problem.y0, requires_grad=True)]
        optimizer = method(x, y, lr_upper=0.05, lr_lower=0.1, hvp=hvp)
        for step in range(20):
            problem.sample(step)
            optimizer.step(*problem.closures(x, y))
        ends.append(torch.cat([*x, *y]).detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-6, atol=1e-7)
    assert not torch.equal(ends[0], ends[1])


def test_warm_start_is_the_lower_level_alone() -> None:
    problem = NoisyProblem()
    x, y = [torch.tensor(problem.x0, requires_grad=True)], [torch.tensor(problem.y0, requires_grad=True)]
    optimizer = AccBO(x, y, lr_upper=0.05, lr_lower=0.1, gamma=0.4)
    _, lower = problem.closures(x, y)
    optimizer.warm_start(lower, 7)
    here, previous = problem.y0, problem.y0
    for _ in range(7):
        w = here + 0.4 * (here - previous)
        previous, here = here, w - 0.1 * problem.lower_gradient(problem.x0, w)
    np.testing.assert_allclose(y[0].detach().numpy(), here, rtol=1e-12)
    np.testing.assert_array_equal(x[0].detach().numpy(), problem.x0)
    assert optimizer.calls.lower_gradients == optimizer.calls.total == 7
    optimizer.warm_start(lower, 500)
    assert np.abs(problem.lower_gradient(problem.x0, y[0].detach().numpy())).max() < 1e-10


def test_calls_are_counted() -> None:
    problem = NoisyProblem()

    def calls(method: Any, steps: int, **options: Any) -> list[int]:
        x, y = [torch.tensor(problem.x0, requires_grad=True)], [torch.tensor(problem.y0, requires_grad=True)]
        optimizer = method(x, y, lr_upper=0.05, lr_lower=0.1, **options)
        for _ in range(steps):
            optimizer.step(*problem.closures(x, y))
        return [optimizer.calls.upper_gradients, optimizer.calls.lower_gradients, optimizer.calls.products]

    start = 9  # the first v: ten terms of the series
    assert calls(MASOBA, 5, scale=0.1) == [5, 5, 10 + start]
    assert calls(MASOBA, 5) == [5, 5, 10 + start + 10]  # and ten power iterations
    assert calls(AccBO, 5, scale=0.1) == [9, 14, 14 + start]
    assert calls(AccBO, 5, scale=0.1, estimator="ema") == [5, 10, 10 + start]
    assert calls(StocBiO, 5, scale=0.1) == [5, 55, 50]
    assert calls(MASOBA, 5, scale=0.1, hvp="finite_difference") == [5, 5 + 2 * 5 + 2 * start, 0]


def test_an_upper_loss_without_x_is_not_asked_at_the_old_point() -> None:
    x, y = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = AccBO([x], [y], lr_upper=0.1, lr_lower=0.1, scale=0.5)
    for _ in range(4):
        optimizer.step(lambda: (y - 2).square().sum(), lambda: (y - x).square().sum())
    assert optimizer.calls.upper_gradients == 4


def test_storm_has_no_lag_where_only_the_upper_level_is_noisy() -> None:
    """``G = 1/2 ||y - x||^2``, ``F = 1/2 ||y - t||^2 + noise'x``: at equal settings the average overshoots."""
    ends = {}
    for estimator in ("storm", "ema"):
        generator = torch.Generator().manual_seed(0)
        x = torch.full((8,), 2.0, dtype=torch.float64, requires_grad=True)
        y = torch.full((8,), 2.0, dtype=torch.float64, requires_grad=True)
        options = {"lr_upper": 0.1, "lr_lower": 0.5, "beta": 0.98, "scale": 1.0}
        optimizer = AccBO([x], [y], estimator=estimator, **options)
        for step in range(200):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 200)
            noise = torch.randn(8, generator=generator, dtype=torch.float64)
            optimizer.step(
                lambda x=x, y=y, noise=noise: 0.5 * y.square().sum() + noise @ x,
                lambda x=x, y=y: 0.5 * (y - x).square().sum(),
            )
        ends[estimator] = float(x.detach().norm())
    assert ends["storm"] < 0.3 * ends["ema"], ends
