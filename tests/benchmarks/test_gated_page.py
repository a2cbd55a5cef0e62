"""docs/gated.md: every row of its tables is one of the tables that were made from the lines."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "gated.md").read_text()
RESULTS = ROOT / "benchmarks" / "results"


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip()[1:-1])]


def _rows(text: str) -> list[dict[str, str]]:
    """The rows of all tables whose first column is the problem."""
    found: list[dict[str, str]] = []
    header: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            header = []
        elif not header:
            header = _cells(line)
        elif header[0] == "problem" and not line.startswith(("|---", "| ---")):
            found.append(dict(zip(header, _cells(line), strict=True)))
    return found


def test_quoted_rows_are_those_of_the_results() -> None:
    measured = [
        row
        for path in RESULTS.glob("evidence_gate*.md")
        for row in _rows(path.read_text().partition("## Best checkpoint")[0])  # at the end of training
    ]
    quoted = _rows(PAGE)
    assert len(quoted) >= 40
    for row in quoted:
        assert any(row.items() <= other.items() for other in measured), row
