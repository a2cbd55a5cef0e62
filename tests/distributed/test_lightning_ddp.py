"""``Trainer(strategy="ddp", devices=2)`` from a script, as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cases import curved
from tests.distributed.scenarios import BATCHES, network
from tests.distributed.test_ranks import ROOT
from tests.twins import relative_error
from torch import Tensor, nn

import newton_plugin as npl

pytestmark = pytest.mark.slow


def run(out: Path, scenario: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    for name in ("LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "tests.distributed.user_script", str(out), scenario]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def states(out: Path, scenario: str) -> list[dict[str, Any]]:
    done = run(out, scenario)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def alone(accumulate: int = 1, clip: float = 0.0, skip: int = -1) -> dict[str, Tensor]:
    """The same batches, whole, in a plain loop in one process."""
    model, hook = network(), npl.LossHook(damping="auto")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    hook.set_optimizer(optimizer)
    for k, (x, t) in enumerate(BATCHES):
        loss = curved(model(x * torch.nan if k == skip else x), t)
        (hook(loss) / accumulate).backward()
        if (k + 1) % accumulate == 0:
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if k == skip:
                optimizer.zero_grad()
            optimizer.step()
            optimizer.zero_grad()
    return {"parameters": nn.utils.parameters_to_vector(model.parameters()).detach(), **hook.state_dict()}


@pytest.mark.parametrize(
    ("scenario", "twin"),
    [
        ("plain_ddp", {}),
        ("accumulate", {"accumulate": 2}),
        ("clipping", {"clip": 0.05}),
        ("static_graph", {}),
        ("nan", {"skip": 1}),
    ],
)
def test_two_ranks_equal_one_process(tmp_path: Path, scenario: str, twin: dict[str, Any]) -> None:
    first, second = states(tmp_path, scenario)
    ours = [torch.cat([p.flatten() for p in s["parameters"].values()]) for s in (first, second)]
    assert torch.equal(*ours)
    assert str(first["newton"]) == str(second["newton"])
    assert relative_error(ours[0], alone(**twin)["parameters"]) <= 1e-10


def test_a_killed_worker_ends_the_run_with_an_error(tmp_path: Path) -> None:
    """Not a hang: the other rank's collective fails, or Lightning notices that its child has gone."""
    assert run(tmp_path, "killed").returncode != 0
    assert not list(tmp_path.iterdir())
