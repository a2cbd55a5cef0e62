"""docs/when-it-helps.md: its code runs, and its tables are rows of the tables that were made from the lines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "when-it-helps.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def test_the_code_runs(capsys: pytest.CaptureFixture) -> None:
    (block,) = re.findall(r"<!-- run: look -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    exec(block, {})
    said = re.fullmatch(r"tail (\d\.\d\d), spread (\d+\.\d)\n", capsys.readouterr().out)
    assert said is not None
    assert 0.1 <= float(said[1]) <= 1
    assert 1.0 <= float(said[2]) < 3.0


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def _table(text: str, first: str) -> dict[str, dict[str, str]]:
    """The last table whose header begins with ``first``: row -> column -> cell."""
    lines = text.splitlines()
    start = max(i for i, line in enumerate(lines) if line.startswith(first))
    header, found = _cells(lines[start]), {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells = _cells(line)
        found[cells[0]] = dict(zip(header, cells, strict=True))
    return found


def test_quoted_differences_are_those_of_the_search() -> None:
    quoted = _table(PAGE, "| arm |")
    results = (RESULTS / "evidence_rules.md").read_text()
    measured = _table(results[: results.index("## Learning rates")].partition("## With intervals")[0], "| arm |")
    assert len(quoted) >= 6
    for arm, row in quoted.items():
        for problem, cell in row.items():
            assert cell == measured[arm][problem], (arm, problem)


def test_quoted_ratios_are_those_of_the_measurement() -> None:
    quoted = [line for line in PAGE.splitlines() if re.search(r"\| (10|50|100) % \|", line)]
    measured = (RESULTS / "evidence_mechanism.md").read_text().splitlines()
    assert len(quoted) >= 6
    assert set(quoted) <= set(measured)
