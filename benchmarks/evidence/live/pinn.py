"""A physics-informed network: the loss holds second derivatives of the network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from benchmarks.evidence.data.images import Part
from benchmarks.terms import pinn_loss
from torch import Tensor, nn

__all__ = ["Physics"]

POINTS = 64


@dataclass(frozen=True)
class Physics:
    """u'' = -pi^2 sin(pi x) on (0, 1) with u = 0 at both ends; equation, loss and network of ``benchmarks.terms``.

    The batch is all 64 points, so that a seed changes the first weights alone. float32. The score is 100 times one less
    the relative L2 error of u, at least 0, on points between those of training: 400 to validate, 400 others to test.
    """

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))

    def training(self, seed: int) -> tuple[Tensor, ...]:
        return (torch.linspace(0, 1, POINTS).unsqueeze(-1),)

    def loss(self, network: nn.Module, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
        return pinn_loss(network, batch[0])

    def score(self, network: nn.Module, part: Part) -> Tensor:
        x = _held_out(part)
        u = torch.sin(math.pi * x)
        return 100 * (1 - (network(x) - u).norm() / u.norm())


def _held_out(part: Part) -> Tensor:
    """(400, 1): even (validation) and odd (test) midpoints of 800 equal cells."""
    middle = (torch.arange(800) + 0.5) / 800
    return middle[{"validation": 0, "test": 1}[part] :: 2].unsqueeze(-1)
