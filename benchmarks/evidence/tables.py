"""Markdown from the lines, and from nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.evidence.figures import curves
from benchmarks.evidence.mechanism_table import mechanism_table
from benchmarks.evidence.paths import Paths, shortcut_scores
from benchmarks.evidence.problems import Problem
from benchmarks.evidence.report_table import report_table
from benchmarks.evidence.runs import Lines
from benchmarks.evidence.search_table import search_table
from benchmarks.evidence.timing import read_times

__all__ = ["write_tables"]


def write_tables(out: Path, every: Mapping[str, Problem]) -> list[Path]:
    """Write ``<out>_rules.md``, and ``<out>_<table>.md`` and ``.png`` for every file of lines; returns their paths."""
    written = []
    search = Lines(out / "search.jsonl").by_run()
    if search:
        written.append(out.with_name(f"{out.name}_rules.md"))
        written[-1].write_text(search_table(search, every))
    mechanism = out / "mechanism.jsonl"
    if mechanism.exists():
        written.append(out.with_name(f"{out.name}_mechanism.md"))
        written[-1].write_text(mechanism_table(mechanism, every))
    for table in dict.fromkeys(problem.table for problem in every.values()):
        done = Lines(out / f"{table}.jsonl").by_run()
        if any(run.purpose == "report" for run in done):
            written.append(out.with_name(f"{out.name}_{table}.md"))
            written[-1].write_text(report_table(table, done, every) + _shortcuts(table, every))
            names = [name for name in every if any(run.problem == name for run in done if run.purpose == "report")]
            written.append(out.with_name(f"{out.name}_{table}.png"))
            curves(written[-1], names, every, done, read_times(out / "times.jsonl"))
    for path in written:
        print(path, flush=True)
    return written


def _shortcuts(table: str, every: Mapping[str, Problem]) -> str:
    """For tables of paths: what somebody scores who knows nothing of the costs."""
    sizes = {problem.size for problem in every.values() if isinstance(problem, Paths) and problem.table == table}
    if not sizes:
        return ""
    scores = shortcut_scores(sizes.pop())
    listed = ", ".join(f"{name}: {score:.1f}" for name, score in scores.items())
    return f"\nSolved on the test maps by who knows nothing of the costs, per cent: {listed}.\n"
