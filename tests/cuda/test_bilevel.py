"""Hypergradients and the bilevel optimizers on the device: the numbers of a CPU; random losses are replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.cuda.device import CPU, DEVICE, error
from torch import Tensor, nn

from newton_plugin.bilevel import BOREP, MASOBA, AccBO, StocBiO, hypergradient

METHODS = [AccBO, MASOBA, BOREP, StocBiO]
PRODUCTS = ["autograd", "finite_difference"]
# Differences of gradients lose half of the digits, and what is left depends on the rounding.
TOLERANCE = {"autograd": 1e-9, "finite_difference": 1e-4}


class Cleaning:
    """Per-sample weights above a small network, everything on one device."""

    def __init__(self, device: torch.device, dropout: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(3)
        self.z = torch.randn(30, 4, generator=generator, dtype=torch.float64).to(device)
        self.labels = torch.randint(0, 3, (30,), generator=generator).to(device)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3)).double().to(device)
        self.weights = torch.linspace(-1, 1, 20, dtype=torch.float64).to(device).requires_grad_()

    def upper(self) -> Tensor:
        return nn.functional.cross_entropy(self.net(self.z[20:]), self.labels[20:]) + 1e-3 * self.weights.square().sum()

    def lower(self) -> Tensor:
        losses = nn.functional.cross_entropy(self.net(self.z[:20]), self.labels[:20], reduction="none")
        decay = torch.stack([p.square().sum() for p in self.net.parameters()]).sum()
        return (self.weights.sigmoid() * losses).mean() + 0.05 * decay

    def parameters(self) -> Tensor:
        return torch.cat([self.weights.detach(), nn.utils.parameters_to_vector(self.net.parameters()).detach()])


@pytest.mark.parametrize("hvp", PRODUCTS)
@pytest.mark.parametrize("method", METHODS)
def test_five_steps(method: Callable[..., Any], hvp: str) -> None:
    found = []
    for device in (DEVICE, CPU):
        problem = Cleaning(device)
        opt = method([problem.weights], problem.net.parameters(), lr_upper=0.03, lr_lower=0.05, hvp=hvp)
        opt.warm_start(problem.lower, 3)
        values = [opt.step(problem.upper, problem.lower) for _ in range(5)]
        assert all(value.device == device for value in values)
        found.append(problem.parameters())
    assert found[0].device == DEVICE
    assert error(*found) <= TOLERANCE[hvp]


def ridge(device: torch.device) -> tuple[Callable[[], Tensor], Callable[[], Tensor], Tensor, Tensor]:
    """``G = 1/2 ||Zy - u||^2 + 1/2 e^x ||y||^2`` at its minimum, F the squared error on other rows."""
    generator = torch.Generator().manual_seed(0)
    z, u, other, right = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((9, 4), (9,), (7, 4), (7,))
    )
    x = torch.tensor(-0.3, dtype=torch.float64)
    y = torch.linalg.solve(z.T @ z + x.exp() * torch.eye(4, dtype=torch.float64), z.T @ u)
    z, u, other, right, x, y = (t.to(device) for t in (z, u, other, right, x, y))
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    return (
        lambda: 0.5 * (other @ y - right).square().sum(),
        lambda: 0.5 * (z @ y - u).square().sum() + 0.5 * x.exp() * y.square().sum(),
        x,
        y,
    )


@pytest.mark.parametrize("hvp", PRODUCTS)
@pytest.mark.parametrize("solver", ["cg", "linear", "neumann"])
def test_hypergradients(solver: Any, hvp: Any) -> None:
    found = []
    for device in (DEVICE, CPU):
        upper, lower, x, y = ridge(device)
        (h,) = hypergradient(upper, lower, [x], [y], solver=solver, hvp=hvp)
        found.append(h)
    assert found[0].device == DEVICE
    assert error(*found) <= TOLERANCE[hvp]


@pytest.mark.parametrize("method", METHODS)
def test_dropout_of_the_device_is_replayed(method: Callable[..., Any]) -> None:
    """Both evaluations of a closure within a step see one mask; the same seed gives the same steps."""
    masks: list[Tensor] = []

    def run() -> Tensor:
        problem = Cleaning(DEVICE, dropout=0.5)
        problem.net[2].register_forward_hook(lambda module, inputs, output: masks.append(output.detach() == 0))
        opt = method([problem.weights], problem.net.parameters(), lr_upper=0.03, lr_lower=0.05)
        for _ in range(3):
            opt.step(problem.upper, problem.lower)
        return problem.parameters()

    first = run()
    seen = len(masks)
    assert error(run(), first) <= 1e-12
    assert len(masks) == 2 * seen
    assert all(map(torch.equal, masks[:seen], masks[seen:]))
    assert bool(torch.isfinite(first).all())
