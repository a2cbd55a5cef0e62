"""Short trainings of a small network: the same numbers go to every device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tests.cases import curved
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin.algorithms import RankingLoss

INPUTS = 4
Loss = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A loss of ``samples`` rows of ``outputs`` numbers, and what makes its targets."""

    loss: Loss
    outputs: int
    samples: int
    targets: Callable[[int, int, torch.Generator], Tensor]

    def batches(self, count: int = 3, dtype: torch.dtype = torch.float64) -> list[Batch]:
        generator = torch.Generator().manual_seed(1)
        drawn = []
        for _ in range(count):
            x = torch.randn(self.samples, INPUTS, generator=generator, dtype=torch.float64).to(dtype)
            t = self.targets(self.samples, self.outputs, generator)
            drawn.append((x, t.to(dtype) if t.is_floating_point() else t))
        return drawn


def classes(n: int, m: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, m, (n,), generator=generator)


def reals(n: int, m: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, m, generator=generator, dtype=torch.float64)


def ranks(n: int, m: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, m, generator=generator).argsort(-1)


TASKS = {
    "cross_entropy": Task(F.cross_entropy, 5, 6, classes),
    "neural_sort": Task(RankingLoss("neural_sort", temperature=0.5), 4, 6, ranks),
    "sorting_network": Task(RankingLoss("sorting_network", steepness=3.0), 4, 6, ranks),
    "curved": Task(curved, 3, 6, reals),
    "wide": Task(F.cross_entropy, 300, 16, classes),
    "wide curved": Task(curved, 300, 16, reals),
    "large": Task(F.cross_entropy, 8192, 64, classes),
}


def network(outputs: int, device: torch.device, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Always with the same weights: they are drawn on the CPU."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, outputs)).to(device, dtype)


def flat_gradient(net: nn.Module) -> Tensor:
    grads = [p.grad for p in net.parameters()]
    return torch.cat([g.flatten() for g in grads if g is not None])


def door(name: str, loss: Loss, **options: Any) -> tuple[Loss, Any]:
    """The loss behind one of the doors, and what has its diagnostics."""
    if name == "newton_loss":
        wrapped = npl.newton_loss(loss, **options)
        return wrapped, wrapped
    hook = npl.LossHook(**options)
    return lambda y, t: hook(loss(y, t)), hook


def train(net: nn.Module, loss: Loss, batches: list[Batch], lr: float = 0.1) -> Tensor:
    """The gradients of all steps, on the CPU; the network goes on from step to step."""
    device = next(net.parameters()).device
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    gradients = []
    for x, t in batches:
        optimizer.zero_grad()
        loss(net(x.to(device)), t.to(device)).backward()
        gradients.append(flat_gradient(net).cpu())
        optimizer.step()
    return torch.cat(gradients)
