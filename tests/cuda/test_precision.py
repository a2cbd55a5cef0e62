"""Half precision on the device, with and without a GradScaler: the step of float32; overflow as without the plugin."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from tests.cuda.device import DEVICE, error
from tests.cuda.training import TASKS, door, flat_gradient, network
from torch import Tensor, nn

ENTRANCES = ["LossHook", "newton_loss"]
OPTIONS: list[dict[str, Any]] = [{}, {"structure": "mean"}, {"curvature": "norm"}, {"curvature": "hessian"}]
ROUNDING = {torch.float16: 2e-2, torch.bfloat16: 1e-1}


def one_step(
    name: str, entrance: str, dtype: torch.dtype | None, scale: float | None = None, **options: Any
) -> tuple[Tensor, float]:
    """The gradient of one step, unscaled; and the fallbacks."""
    task = TASKS[name]
    net = network(task.outputs, DEVICE, torch.float32)
    loss, watched = door(entrance, task.loss, **options)
    x, t = (part.to(DEVICE) for part in task.batches(1, torch.float32)[0])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=scale or 1.0, enabled=scale is not None)
    with torch.autocast(DEVICE.type, dtype) if dtype else contextlib.nullcontext():
        y = net(x)
        assert y.dtype == (dtype or torch.float32)
        value = loss(y, t)
    scaler.scale(value).backward()
    scaler.unscale_(optimizer)
    gradient = flat_gradient(net)
    before = [p.detach().clone() for p in net.parameters()]
    scaler.step(optimizer)
    scaler.update()
    assert not all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True)), "no step was skipped"
    return gradient, watched.diagnostics()["fallbacks"]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("entrance", ENTRANCES)
@pytest.mark.parametrize("name", ["cross_entropy", "neural_sort"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_takes_the_step_of_float32(
    dtype: torch.dtype, name: str, entrance: str, options: dict[str, Any]
) -> None:
    full, _ = one_step(name, entrance, None, **options)
    half, fallbacks = one_step(name, entrance, dtype, 256.0 if dtype == torch.float16 else None, **options)
    assert fallbacks == 0
    assert error(half, full) <= ROUNDING[dtype]


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_the_scale_of_a_scaler_goes_through(entrance: str) -> None:
    plain, _ = one_step("cross_entropy", entrance, torch.float16)
    for scale in (2.0, 256.0):
        scaled, _ = one_step("cross_entropy", entrance, torch.float16, scale)
        assert error(scaled, plain) <= 2e-3


def overflow(entrance: str, net: nn.Module, scaler: Any, factor: float) -> float:
    """One step of another loss on the same network; the fallbacks."""
    net.zero_grad()
    task = TASKS["cross_entropy"]
    loss, watched = door(entrance, task.loss)
    x, t = (part.to(DEVICE) for part in task.batches(1, torch.float32)[0])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with torch.autocast(DEVICE.type, torch.float16):
        value = loss(net(x) * factor, t)
    scaler.scale(value).backward()
    scaler.step(optimizer)
    scaler.update()
    return watched.diagnostics()["fallbacks"]


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_outputs_that_overflow(entrance: str) -> None:
    """Logits beyond float16: their gradient is NaN and stays so, the scaler skips the step, the batch is counted."""
    net = network(5, DEVICE, torch.float32)
    before = [p.detach().clone() for p in net.parameters()]
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0, growth_interval=1000)
    assert overflow(entrance, net, scaler, 1e9) == 1
    assert scaler.get_scale() == 128.0
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    assert overflow(entrance, net, scaler, 1.0) == 0
    assert not all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("entrance", ENTRANCES)
def test_a_scale_that_overflows(entrance: str) -> None:
    """The step is fine, float16 cannot hold its multiple: the scaler skips it, as it would a gradient."""
    net = network(5, DEVICE, torch.float32)
    before = [p.detach().clone() for p in net.parameters()]
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**24, growth_interval=1000)
    assert overflow(entrance, net, scaler, 1.0) == 0
    assert scaler.get_scale() == 2.0**23
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
