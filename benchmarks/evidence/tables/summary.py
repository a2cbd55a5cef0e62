"""One line for each arm over all tables of the report: where it is significantly better, and where worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.tables.markdown import lines
from benchmarks.evidence.tables.report import final_comparisons
from benchmarks.evidence.training.arms import ARMS, COMPOSED, shown
from benchmarks.evidence.training.runs import Lines

__all__ = ["summary_table"]

Found = list[tuple[str, float]]  # titles of problems, and mean differences


def summary_table(out: Path, tables: Sequence[str], every: Mapping[str, Problem]) -> str:
    """Markdown: counts over the tables, each corrected by itself, at the end of training."""
    better: dict[str, Found] = {}
    worse: dict[str, Found] = {}
    compared: dict[str, int] = {}
    for file in tables:
        done, table = Lines(out / f"{file}.jsonl").by_run(), file.removeprefix("noretune_").removeprefix("fresh_")
        for (name, arm), (comparison, corrected) in final_comparisons(table, done, every).items():
            compared[arm] = compared.get(arm, 0) + 1
            if corrected < 0.05:
                found = better if comparison.mean > 0 else worse
                found.setdefault(arm, []).append((every[name].title, comparison.mean))
    rows = [
        [shown(arm), str(compared[arm]), _listed(better.get(arm, [])), _listed(worse.get(arm, []))]
        for arm in (*ARMS, *COMPOSED)
        if arm in compared
    ]
    return (
        "# Evidence: in one table\n\nMade by `python -m benchmarks.evidence tables`: test data at the end, differences "
        "to plain, stable with p < .05 after Holm over the comparisons of their own table "
        f"({', '.join(tables)}), points.\n\n"
        + lines(["arm", "compared on", "significantly better", "significantly worse"], rows)
        + "\n"
    )


def _listed(found: Found) -> str:
    ordered = sorted(found, key=lambda pair: -abs(pair[1]))
    return f"{len(found)}" + (": " if found else "") + "; ".join(f"{title} {mean:+.1f}" for title, mean in ordered)
