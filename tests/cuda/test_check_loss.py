"""``check_loss`` of outputs on the device has the findings of a CPU, and does not change the random states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.cuda.device import DEVICE, cuda_alone, there
from tests.cuda.training import TASKS, ranks
from torch import Tensor

from newton_plugin.testing import check_loss

NAMES = ["cross_entropy", "neural_sort", "sorting_network", "curved"]


def flat(y: Tensor, t: Tensor) -> Tensor:
    return (y - t).abs().sum(-1).mean()


def once(y: Tensor, t: Tensor) -> Tensor:
    """Without a second derivative."""
    return torch.cdist(y, t).square().sum(-1).mean()


def coupled(y: Tensor, t: Tensor) -> Tensor:
    return ((y - y.mean(0) - t) ** 4).sum(-1).mean()


def dropped(y: Tensor, t: Tensor) -> Tensor:
    return torch.nn.functional.dropout(y - t, 0.3).square().sum(-1).mean()


def batch(name: str) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    if name in TASKS:
        task = TASKS[name]
        y = torch.randn(task.samples, task.outputs, generator=generator, dtype=torch.float64)
        return task.loss, y, task.targets(task.samples, task.outputs, generator)
    loss = {"flat": flat, "once": once, "coupled": coupled, "dropped": dropped}[name]
    both = torch.randn(2, 6, 4, generator=generator, dtype=torch.float64)
    return loss, both[0], both[1]


def verdicts(report: Any) -> dict[str, str]:
    """Of every finding but the cost, which is a time."""
    found = {k: v.verdict for k, v in vars(report).items() if hasattr(v, "verdict")}
    found.pop("cost")
    return {**found, "available": str(report.available), "without": report.without_hessian}


@pytest.mark.parametrize("name", [*NAMES, "flat", "once", "coupled", "dropped"])
def test_the_findings_of_a_cpu(name: str) -> None:
    loss, y, t = batch(name)
    ours = check_loss(loss, there(y), there(t))
    found, expected = verdicts(ours), verdicts(check_loss(loss, y, t))
    if name == "dropped":  # another operation than on a CPU, and torch.func asks of each in its own way
        found, expected = ({k: v for k, v in each.items() if "func" not in k} for each in (found, expected))
    assert found == expected
    assert ours.evaluation.ok
    assert ours.name in str(ours)


def test_a_loss_whose_targets_are_elsewhere_is_a_finding() -> None:
    """A CUDA tensor beside a CPU tensor: said in words, not raised."""
    loss, y, _ = batch("neural_sort")
    report = check_loss(loss, there(y), ranks(y.shape[0], y.shape[1], torch.Generator().manual_seed(0)))
    assert report.evaluation.ok == (DEVICE.type == "cpu")
    assert str(report)


@cuda_alone
def test_random_states_are_put_back() -> None:
    loss, y, t = batch("dropped")
    torch.manual_seed(0)
    before = torch.cuda.get_rng_state(DEVICE), torch.get_rng_state()
    check_loss(loss, there(y), there(t))
    assert torch.equal(torch.cuda.get_rng_state(DEVICE), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
