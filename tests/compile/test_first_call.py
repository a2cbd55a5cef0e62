"""The first call of ``solve_qp`` on a machine compiles for some twenty seconds, and says so once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

numba = pytest.importorskip("numba")
event = pytest.importorskip("numba.core.event")

FIRST = (
    "import torch; from newton_plugin.convex import solve_qp; p = torch.ones(1, requires_grad=True); "
    "solve_qp(torch.eye(1), p).x.sum().backward(); print(p.grad.item())"
)


def test_compiling_is_said_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from newton_plugin.convex._compiled.jit import _Announcement

    monkeypatch.setattr(_Announcement, "said", False)
    with caplog.at_level(logging.WARNING, "newton_plugin"), event.install_listener("numba:compile", _Announcement()):
        assert numba.njit("int64(int64)")(lambda x: x + 1)(1) == 2
        assert numba.njit("int64(int64)")(lambda x: x + 2)(1) == 3
    assert [r.name for r in caplog.records] == ["newton_plugin"]
    assert "twenty seconds" in caplog.text


@pytest.mark.slow
def test_a_warm_cache_is_silent(tmp_path: Path) -> None:
    said = []
    for _ in range(2):
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        result = subprocess.run(
            [sys.executable, "-c", FIRST], capture_output=True, text=True, check=True, env=environment
        )
        assert result.stdout == "-1.0\n"
        said.append(result.stderr.count("compiles its QP solver"))
    assert said == [1, 0]
