"""A process may destroy its process group before it saves, and before it ends."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from newton_plugin._runtime import processes


@pytest.fixture
def group(tmp_path: Path) -> Iterator[processes.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield processes._group_of(dist.group.WORLD)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_it_is_freed() -> None:
    """Its threads would outlive it, and the interpreter would abort at its end."""
    assert processes._group_of(dist.group.WORLD) is processes._group_of(dist.group.WORLD)
    found = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    gc.collect()
    assert found() is None


def test_sums_under_way_are_taken_in(group: processes.ProcessGroup) -> None:
    delivered: list[Tensor] = []
    group.start("a step", torch.ones(2), delivered.append)
    dist.destroy_process_group()
    group.finish()
    assert [sums.tolist() for sums in delivered] == [[1, 1]]
