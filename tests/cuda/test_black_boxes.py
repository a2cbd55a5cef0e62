"""Smoothed functions and perturbed solvers on the device: noise from a generator of the CPU is the same everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.cuda.device import CPU, DEVICE, error, there
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin.algorithms import FenchelYoungLoss, PerturbedOptimizer, StochasticSmoothing

Y = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OBSERVED = torch.eye(5, dtype=torch.float64)[[0, 2, 1, 4]]
ESTIMATORS = ["score", "symmetric_score", "finite_difference"]
NOISES = ["gaussian", "gumbel"]


def highest(scores: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1])


def highest_in_numpy(scores: Tensor) -> Any:
    """A solver that leaves torch: it gets tensors of the device, and may give back arrays."""
    return highest(scores.cpu()).numpy()


def miss(scores: Tensor) -> Tensor:
    """A loss of each problem: whether the first class is not the highest."""
    return (scores.argmax(-1) != 0).double()


def fenchel_young(solver: Callable[..., Any], noise: str, generator: torch.Generator | None) -> nn.Module:
    return FenchelYoungLoss(solver, samples=16, sigma=0.7, noise=noise, generator=generator)


def on(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(3)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("solver", [highest, highest_in_numpy])
@pytest.mark.parametrize("structure", ["mean", "per_sample"])
def test_fenchel_young_steps(solver: Callable[..., Any], noise: str, structure: Any) -> None:
    def taken(y: Tensor) -> npl.NewtonStep:
        loss = fenchel_young(solver, noise, on(CPU))
        return npl.newton_step(
            loss, y.requires_grad_(), OBSERVED.to(y), curvature="hessian", structure=structure, damping=0.1
        )

    ours, theirs = taken(there(Y)), taken(Y.clone())
    assert ours.step.device == DEVICE
    assert error(ours.gradient, theirs.gradient) <= 1e-9
    assert error(ours.step, theirs.step) <= 1e-9


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("solver", [highest, highest_in_numpy])
def test_perturbed_optimizers(solver: Callable[..., Any], estimator: str) -> None:
    def derived(y: Tensor) -> list[Tensor]:
        y.requires_grad_()
        soft = PerturbedOptimizer(solver, samples=16, sigma=0.7, estimator=estimator, generator=on(CPU))
        value = soft(y)
        (gradient,) = torch.autograd.grad((value - OBSERVED.to(y)).square().sum(), y)
        return [value, gradient]

    ours, theirs = derived(there(Y)), derived(Y.clone())
    assert all(part.device == DEVICE for part in ours)
    assert max(map(error, ours, theirs)) <= 1e-9


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("baseline", ["leave_one_out", "value", "none"])
def test_smoothed_losses(baseline: str, antithetic: bool) -> None:
    def taken(y: Tensor) -> npl.NewtonStep:
        smooth = StochasticSmoothing(
            miss, samples=16, sigma=0.7, baseline=baseline, antithetic=antithetic, generator=on(CPU)
        )
        return npl.newton_step(smooth, y.requires_grad_(), curvature="hessian", damping=0.5)

    ours, theirs = taken(there(Y)), taken(Y.clone())
    assert error(ours.gradient, theirs.gradient) <= 1e-9
    assert error(ours.step, theirs.step) <= 1e-9


@pytest.mark.parametrize("own", [True, False], ids=["generator of the device", "torch's own"])
@pytest.mark.parametrize("noise", [*NOISES, "cauchy"])
def test_noise_of_the_device(noise: str, own: bool) -> None:
    """Other numbers than a CPU's; the same from the same seed."""

    def gradient(seed: int) -> Tensor:
        torch.manual_seed(seed)
        generator = torch.Generator(DEVICE).manual_seed(seed) if own else None
        y = there(Y).requires_grad_()
        soft = PerturbedOptimizer(highest, samples=64, sigma=0.7, noise=noise, generator=generator)
        (found,) = torch.autograd.grad((soft(y) * OBSERVED.to(y)).sum(), y)
        return found

    first = gradient(0)
    assert first.device == DEVICE
    assert bool(torch.isfinite(first).all())
    assert torch.equal(gradient(0), first)
    assert not torch.equal(gradient(1), first)


def test_training_behind_a_solver() -> None:
    """The hook's closed form of the loss's Hessian, in a network."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for device in (DEVICE, CPU):
        torch.manual_seed(0)
        net = nn.Linear(3, 5).double().to(device)
        hook, loss = npl.LossHook(curvature="hessian"), fenchel_young(highest, "gaussian", on(CPU))
        for _ in range(2):
            net.zero_grad()
            hook(loss(net(x.to(device)), OBSERVED.to(device))).backward()
        assert net.weight.grad is not None
        found.append(net.weight.grad)
        assert hook.diagnostics()["fallbacks"] == 0
    assert error(*found) <= 1e-9
