"""examples/my_own_loss.ipynb runs from the first cell to the last, finds what it says, and is kept without outputs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch

PATH = Path(__file__).parent.parent.parent / "examples" / "my_own_loss.ipynb"
CELLS = json.loads(PATH.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_outputs_are_stripped() -> None:
    code = [cell for cell in CELLS if cell["cell_type"] == "code"]
    assert len(code) >= 7
    assert [(cell["outputs"], cell["execution_count"]) for cell in code] == [([], None)] * len(code)


def test_it_runs_and_finds_what_it_says(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: Any) -> None:
    """Cell by cell in one namespace, as a kernel does, on one thread and without one."""
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))
    names: dict[str, Any] = {"__name__": "__main__"}
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        for number, code in enumerate(CODE):
            exec(compile(ast.parse(code), f"{PATH.name}, code cell {number}", "exec"), names)
    assert torch.get_num_threads() == threads
    assert names["first_report"].advice.take == "mend", "the textbook form is wrong in float32"
    assert names["report"].advice.take == "default"
    assert names["report"].precision.status == "ok"
    outputs, target = (torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5).argsort(-1))
    torch.testing.assert_close(names["mended"](outputs, target), names["textbook"](outputs, target))
    assert names["seen"].watched["outputs"].reading("gate") > 0.5, "30 % of the lists are wrong"
    assert "contradicts its body" in str(names["seen"])
    printed = capsys.readouterr().out
    assert names["comparison"].verdict in printed
    assert (tmp_path / "table.md").exists()
