"""``torch.compile`` by inductor on the device: a compiled network, a compiled loss."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.cuda.device import DEVICE, error
from tests.cuda.training import TASKS, door, network, train
from torch import Tensor, nn

TASK = TASKS["curved"]


@pytest.fixture(scope="module", autouse=True)
def compiler() -> Iterator[None]:
    """Inductor needs a compiler of the machine's own, and its headers."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x = torch.ones(8, device=DEVICE, dtype=torch.float64)
            assert float(torch.compile(lambda v: torch.tanh(v).sin() + 1)(x).sum()) > 0
    except Exception as reason:
        pytest.skip(f"inductor does not compile for {DEVICE.type} here: {str(reason).strip().splitlines()[0]}")
    yield
    torch._dynamo.reset()


def trained(net: nn.Module, forward: Any, loss: Any) -> Tensor:
    class Forwarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return forward(x)

    return train(Forwarded(), loss, TASK.batches())


@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
def test_a_compiled_network(curvature: str) -> None:
    options = {"curvature": curvature, "damping": 0.1}
    net = network(TASK.outputs, DEVICE)
    expected = trained(net, net, door("LossHook", TASK.loss, **options)[0])
    net = network(TASK.outputs, DEVICE)
    loss, hook = door("LossHook", TASK.loss, **options)
    assert error(trained(net, torch.compile(net), loss), expected) <= 1e-9
    assert hook.diagnostics()["fallbacks"] == 0


@pytest.mark.parametrize("structure", ["auto", "mean"])
@pytest.mark.parametrize("entrance", ["LossHook", "newton_loss"])
def test_a_compiled_loss(entrance: str, structure: str) -> None:
    net = network(TASK.outputs, DEVICE)
    expected = trained(net, net, door(entrance, TASK.loss, structure=structure)[0])
    net = network(TASK.outputs, DEVICE)
    loss, watched = door(entrance, torch.compile(TASK.loss), structure=structure)
    assert error(trained(net, net, loss), expected) <= 1e-9
    assert watched.diagnostics()["fallbacks"] == 0
