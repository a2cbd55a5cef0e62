"""Cells and tables in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.evidence.tables.paired import Comparison

__all__ = ["difference", "lines", "number", "spread"]

_WIDE = 5.0  # points of standard deviation above which mean and deviation mislead


def lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *escaped])


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; where that is large, median and quartiles."""
    if len(values) < 2:
        return f"{values[0]:.1f}"
    deviation = statistics.stdev(values)
    if deviation <= _WIDE:
        return f"{statistics.mean(values):.1f} ± {deviation:.1f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{statistics.mean(values):.1f}; median {middle:.1f} ({low:.1f} to {high:.1f})"


def difference(c: Comparison, corrected: float) -> str:
    """Mean, interval and a mark: ** for a corrected p below .05."""
    text = f"{c.mean:+.1f} [{c.low:+.1f}, {c.high:+.1f}]"
    return f"**{text}**" if corrected < 0.05 else text


def number(value: float | None) -> str:
    """Short."""
    return "" if value is None else f"{value:g}"
