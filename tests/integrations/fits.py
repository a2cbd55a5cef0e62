"""One model, one loss, a few batches, and the training that every framework should arrive at, in plain float64."""

from __future__ import annotations

from typing import Any

import torch
from tests.cases import Functional
from tests.lightning.fits import batches_of
from tests.twins import gradients_and_hessians, relative_error, step
from torch import Tensor, nn

import newton_plugin as npl

DAMPING = 0.05
RATE = 0.5


def model() -> Functional:
    """A classifier in float64, always with the same weights."""
    torch.manual_seed(0)
    return Functional().double()


def batches(count: int = 6) -> list[tuple[Tensor, Tensor]]:
    return batches_of(Functional, count)


def surrogate_fit(net: Functional, data: list[Any], accumulate: int = 1) -> None:
    """SGD on the mean surrogate of every ``accumulate`` batches, the step by the dense twin."""
    for k in range(0, len(data), accumulate):
        group = data[k : k + accumulate]
        net.zero_grad()
        for x, t in group:
            y = net(x)
            g, h = gradients_and_hessians(lambda rows, t=t: net.loss(rows, t), y)
            taken = step(g, h, "fisher", "mean", 1, DAMPING)
            (npl.quadratic_surrogate(y, y.detach() - taken) / accumulate).backward()
        descend(net)


def descend(net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            assert p.grad is not None
            p -= RATE * p.grad


def distance(one: nn.Module, other: nn.Module) -> float:
    vectors = [nn.utils.parameters_to_vector(m.parameters()).detach().double() for m in (one, other)]
    return relative_error(*vectors)
