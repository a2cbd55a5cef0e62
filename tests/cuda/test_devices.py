"""Running means, checkpoints, models and criteria on their way between devices."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from tests.cuda.device import CPU, DEVICE, error
from tests.cuda.training import TASKS, Batch, flat_gradient, network, train
from torch import Tensor, nn

import newton_plugin as npl

TASK = TASKS["cross_entropy"]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"structure": "mean"},
    {"structure": "per_sample"},
    {"curvature": "norm"},
    {"curvature": "hessian"},
    {"curvature": npl.EmpiricalFisher("mean", refresh_every=3)},
    {"curvature": npl.Hessian("mean", refresh_every=3)},
]
every_setting = pytest.mark.parametrize("options", SETTINGS, ids=str)
WAYS = [(DEVICE, CPU), (CPU, DEVICE)]
both_ways = pytest.mark.parametrize(("before", "after"), WAYS, ids=["to the CPU", "from the CPU"])


def steps_of(hook: npl.LossHook, net: nn.Module, batches: list[Batch]) -> Tensor:
    return train(net, lambda y, t: hook(TASK.loss(y, t)), batches)


def uninterrupted(options: dict[str, Any]) -> Tensor:
    hook, net = npl.LossHook(**options), network(TASK.outputs, CPU)
    batches = TASK.batches(4)
    steps_of(hook, net, batches[:2])
    return steps_of(hook, net, batches[2:])


@both_ways
@every_setting
def test_a_model_that_moves_in_the_middle(before: torch.device, after: torch.device, options: dict[str, Any]) -> None:
    hook, net = npl.LossHook(**options), network(TASK.outputs, before)
    batches = TASK.batches(4)
    steps_of(hook, net, batches[:2])
    assert error(steps_of(hook, net.to(after), batches[2:]), uninterrupted(options)) <= 1e-9
    assert hook.diagnostics()["fallbacks"] == 0


@pytest.mark.parametrize("mapped", [True, False], ids=["map_location", "as it is"])
@both_ways
@every_setting
def test_a_state_from_another_device(
    before: torch.device, after: torch.device, options: dict[str, Any], mapped: bool
) -> None:
    first, net = npl.LossHook(**options), network(TASK.outputs, before)
    batches = TASK.batches(4)
    steps_of(first, net, batches[:2])
    file = io.BytesIO()
    torch.save({"hook": first.state_dict(), "net": net.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, map_location=after if mapped else None, weights_only=True)
    second, other = npl.LossHook(**options), network(TASK.outputs, after)
    second.load_state_dict(state["hook"])
    other.load_state_dict(state["net"])
    assert error(steps_of(second, other, batches[2:]), uninterrupted(options)) <= 1e-9
    assert second.diagnostics()["fallbacks"] == 0


def criterion_gradient(criterion: nn.Module, device: torch.device) -> Tensor:
    net = network(TASK.outputs, device)
    x, t = (part.to(device) for part in TASK.batches(1)[0])
    criterion(net(x), t).backward()
    return flat_gradient(net)


@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
def test_a_criterion_with_weights(curvature: str) -> None:
    weight = torch.tensor([1.0, 2.0, 0.5, 1.5, 1.0], dtype=torch.float64)
    criterion = npl.NewtonLoss(nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1), curvature=curvature)  # type: ignore[arg-type]
    moved = copy.deepcopy(criterion).to(DEVICE)
    ours = criterion_gradient(moved, DEVICE)
    assert error(ours, criterion_gradient(criterion, CPU)) <= 1e-9
    assert error(criterion_gradient(copy.deepcopy(moved).to(CPU), CPU), criterion_gradient(criterion, CPU)) <= 1e-9
    assert all(buffer.device == DEVICE for buffer in moved.buffers())


def test_a_step_is_on_the_device_of_the_outputs() -> None:
    x, t = (part.to(DEVICE) for part in TASK.batches(1)[0])
    taken = npl.newton_step(TASK.loss, network(TASK.outputs, DEVICE)(x), t, structure="mean")
    parts = [taken.step, taken.target, taken.gradient, taken.damping]
    assert taken.curvature is not None
    assert all(part.device == DEVICE for part in [*parts, taken.curvature])
