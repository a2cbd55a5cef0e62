"""A whole training step, hook and optimizer included, in a CUDA graph: its replays equal the steps without a graph.

Capture forbids whatever waits for the device. A replay repeats what the device did, not what Python did: each batch is
copied into the tensors of the capture, and every running state has to keep its tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.cuda.device import DEVICE, cuda_alone, error
from tests.cuda.training import TASKS, Batch, network
from torch import Tensor, nn

import newton_plugin as npl

pytestmark = cuda_alone
TASK = TASKS["cross_entropy"]
WARM = 3  # steps before the capture


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def adam(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=0.01, capturable=True)


Make = Callable[[nn.Module], torch.optim.Optimizer]


class Loop:
    """A network, its optimizer and the hook; one batch at a time is copied into ``x`` and ``t``."""

    def __init__(self, make: Make, options: dict[str, Any]) -> None:
        self.net = network(TASK.outputs, DEVICE)
        self.optimizer, self.hook = make(self.net), npl.LossHook(**options)
        self.x, self.t = (part.to(DEVICE) for part in TASK.batches(1)[0])

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.hook(TASK.loss(self.net(self.x), self.t)).backward()
        self.optimizer.step()

    def copy(self, batch: Batch) -> None:
        self.x.copy_(batch[0])
        self.t.copy_(batch[1])

    def parameters(self) -> Tensor:
        torch.cuda.synchronize()
        return nn.utils.parameters_to_vector(self.net.parameters()).detach().clone()


def eager(make: Make, options: dict[str, Any], batches: list[Batch]) -> list[Tensor]:
    loop, found = Loop(make, options), []
    for _ in range(WARM):
        loop.step()
    for batch in batches:
        loop.copy(batch)
        loop.step()
        found.append(loop.parameters())
    return found


def replayed(make: Make, options: dict[str, Any], batches: list[Batch]) -> list[Tensor]:
    loop, found = Loop(make, options), []
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            loop.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    loop.optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):  # records, computes nothing
        loop.step()
    for batch in batches:
        loop.copy(batch)
        graph.replay()
        found.append(loop.parameters())
    return found


def compare(make: Make, options: dict[str, Any]) -> None:
    batches = TASK.batches(6)[1:]
    ours, theirs = replayed(make, options, batches), eager(make, options, batches)
    errors = [error(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) <= 1e-9, errors


@pytest.mark.parametrize("make", [sgd, adam])
def test_a_plain_step(make: Make) -> None:
    """Without anything of ours: what the test itself does is right."""

    class Nothing:
        def __call__(self, loss: Tensor) -> Tensor:
            return loss

    batches, found = TASK.batches(6)[1:], []
    for run in (replayed, eager):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(npl, "LossHook", Nothing)
            found.append(run(make, {}, batches)[-1])
    assert error(*found) <= 1e-9


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize(
    "options",
    [
        {"damping": 0.1},
        {"damping": 0.1, "structure": "isotropic"},
        {"damping": 0.1, "structure": "per_sample"},
        {"damping": 0.1, "structure": "diagonal"},
        {"curvature": "norm"},
    ],
    ids=str,
)
def test_a_step_without_a_running_state(make: Make, options: dict[str, Any]) -> None:
    compare(make, options)


@pytest.mark.parametrize("make", [sgd, adam])
@pytest.mark.parametrize("structure", ["auto", "mean", "per_sample"])
def test_the_default_step(make: Make, structure: str) -> None:
    """Its running mean has to go on from replay to replay."""
    compare(make, {"structure": structure})
