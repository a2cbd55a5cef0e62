"""Two processes, started as a user would start them; each scenario's outcome on both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.distributed import collectives, gated, lagged
from tests.distributed.scenarios import SCENARIOS

assert all((collectives, gated, lagged))  # they add to the scenarios
ROOT = Path(__file__).parent.parent.parent


def launch(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """``torchrun`` with two processes."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    out = tmp_path_factory.mktemp("ranks")
    done = launch("-m", "tests.distributed.run_scenarios", str(out))
    files = [out / f"rank{rank}.json" for rank in range(2)]
    assert all(f.exists() for f in files), done.stderr
    return [json.loads(f.read_text()) for f in files]


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(outcomes: list[dict[str, str]], name: str) -> None:
    for rank, outcome in enumerate(outcomes):
        assert outcome.get(name, "not reached: an earlier scenario left a rank waiting") == "", f"on rank {rank}"
