"""One process in a group of its own: NCCL's collectives on the tensors of the device, gloo's between the hosts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.cuda.device import DEVICE, error
from tests.cuda.training import TASKS, network, train
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import newton_plugin as npl
from newton_plugin._runtime.processes import ProcessGroup

BACKEND = "nccl" if DEVICE.type == "cuda" else "gloo"
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and getattr(dist, f"is_{BACKEND}_available")()), reason=f"this torch has no {BACKEND}"
)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"structure": "mean", "damping": 0.1},
    {"structure": "per_sample"},
    {"curvature": "hessian"},
    {"curvature": "norm"},
]


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The default group, of this process alone; it needs no network."""
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    dist.init_process_group(BACKEND, init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def counted_as_many(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process is its own batch, and no collective would run; here it is a group all the same."""
    ranks = ProcessGroup()
    for module in ("_step.exchange", "_step.engine", "_step.compute"):
        monkeypatch.setattr(f"newton_plugin.{module}.current_ranks", lambda sync: ranks)


def trained(name: str, options: dict[str, Any], ddp: bool = False) -> Tensor:
    task = TASKS[name]
    net: nn.Module = network(task.outputs, DEVICE)
    if ddp:
        net = DistributedDataParallel(net, device_ids=[DEVICE] if DEVICE.type == "cuda" else None)
    hook = npl.LossHook(**options)
    gradients = train(net, lambda y, t: hook(task.loss(y, t)), task.batches())
    assert hook.diagnostics()["fallbacks"] == 0
    return gradients


@pytest.mark.parametrize("ddp", [False, True], ids=["plain", "DDP"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_group_of_one(group: None, options: dict[str, Any], ddp: bool) -> None:
    ours = trained("curved", {**options, "sync": True}, ddp)
    assert error(ours, trained("curved", {**options, "sync": False})) <= 1e-12


@pytest.mark.parametrize("ddp", [False, True], ids=["plain", "DDP"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["cross_entropy", "wide"])
def test_through_the_collectives(name: str, options: dict[str, Any], ddp: bool, request: pytest.FixtureRequest) -> None:
    alone = trained(name, options)
    request.getfixturevalue("counted_as_many")
    assert error(trained(name, options, ddp), alone) <= 1e-9


def test_what_travels(group: None) -> None:
    ranks = ProcessGroup()
    rows = torch.arange(12.0, dtype=torch.float64, device=DEVICE).reshape(4, 3)
    assert torch.equal(ranks.mean(rows.sum(0), 4), rows.mean(0))
    gathered, own = ranks.rows(rows)
    assert torch.equal(gathered[own], rows)
    for flag in (True, False):
        assert bool(ranks.all(torch.tensor(flag, device=DEVICE))) == flag
    assert ranks.count(4) == 4
    assert ranks.worst(2) == 2
    sums, agreed = ranks.exchange("the same on all", rows.sum(0))
    assert torch.equal(sums, rows.sum(0))
    assert agreed is None
    sums, agreed = ranks.exchange("the same on all", rows.sum(0), later=True)
    assert torch.equal(sums, rows.sum(0))
    assert agreed is not None
    assert bool(agreed)
    ranks.settle()
    ranks.agree("the same on all")


def test_a_step_after_another_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group may be destroyed and another made within one process."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")
    for k in range(2):
        dist.init_process_group(BACKEND, init_method=f"file://{tmp_path / str(k)}", rank=0, world_size=1)
        try:
            assert ProcessGroup().count(3) == 3
            trained("cross_entropy", {})
        finally:
            dist.destroy_process_group()
