"""Write every table and figure of the evidence, from the lines of results and from nothing else.

A new table of a kind that exists needs no code here: problems with another ``table`` name (``problems/registry.py``)
get a file of lines and a report table of their own. A new kind of table is one file in this folder with a function
``new_table(done, every) -> str`` that returns Markdown, and one block in :func:`write_tables` that reads its lines
(``Lines(out / "new.jsonl").by_run()``), and writes ``<out>_new.md``. Its runs come from a file in ``training/``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from benchmarks.evidence.bilevel_lists import BILEVEL, found_lists
from benchmarks.evidence.live.problems import LIVE
from benchmarks.evidence.problems.beyond import ignorant_scores
from benchmarks.evidence.problems.paths import Paths, shortcut_scores
from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.tables.damping import damping_figure, damping_table
from benchmarks.evidence.tables.figures import curves
from benchmarks.evidence.tables.fixed import fixed_table
from benchmarks.evidence.tables.mechanism import mechanism_table
from benchmarks.evidence.tables.report import report_table
from benchmarks.evidence.tables.search import search_table
from benchmarks.evidence.tables.summary import summary_table
from benchmarks.evidence.training.runs import Lines
from benchmarks.evidence.training.timing import read_times

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
    damping = Lines(out / "damping.jsonl").by_run()
    if damping:
        written += [out.with_name(f"{out.name}_damping{suffix}") for suffix in (".md", ".png")]
        written[-2].write_text(damping_table(damping, every))
        damping_figure(written[-1], damping, every)
    paper = Lines(out / "ranking_paper.jsonl").by_run()
    if paper:
        written.append(out.with_name(f"{out.name}_ranking_paper.md"))
        written[-1].write_text(fixed_table(paper, every))
    every = {**every, **BILEVEL, **LIVE}  # type: ignore[dict-item]  # whose runs are no stacks of replicas
    reported = []
    for table in dict.fromkeys(problem.table for problem in every.values() if problem.table != "ranking_paper"):
        done = Lines(out / f"{table}.jsonl").by_run()
        if any(run.purpose == "report" for run in done):
            reported.append(table)
            written.append(out.with_name(f"{out.name}_{table}.md"))
            written[-1].write_text(
                report_table(table, done, every, f"{out.name}/{table}.jsonl")
                + _shortcuts(table, every)
                + found_lists(done)
            )
            names = [name for name in every if any(run.problem == name for run in done if run.purpose == "report")]
            written.append(out.with_name(f"{out.name}_{table}.png"))
            curves(written[-1], names, every, done, read_times(out / "times.jsonl"))
    for what, table in itertools.product(("noretune", "fresh"), ("no_harm", "live", "paths")):
        done = Lines(out / f"{what}_{table}.jsonl").by_run()
        if done:
            reported.append(f"{what}_{table}")
            said = f"{out.name}/{what}_{table}.jsonl (every arm at the learning rate that tuning chose for plain)"
            written.append(out.with_name(f"{out.name}_{what}_{table}.md"))
            written[-1].write_text(report_table(table, done, every, said))
    if len(reported) > 1:
        written.append(out.with_name(f"{out.name}_summary.md"))
        written[-1].write_text(summary_table(out, reported, every))
    for path in written:
        print(path, flush=True)
    return written


def _shortcuts(table: str, every: Mapping[str, Problem]) -> str:
    """For tables of paths and beyond the paper: what somebody scores who has learned nothing."""
    if table == "beyond":
        listed = "; ".join(f"{every[name].title}: {score:.1f}" for name, score in ignorant_scores().items())
        return f"\nWhat who has learned nothing scores on the test data, per cent: {listed}.\n"
    sizes = {problem.size for problem in every.values() if isinstance(problem, Paths) and problem.table == table}
    if not sizes:
        return ""
    scores = shortcut_scores(sizes.pop())
    listed = ", ".join(f"{name}: {score:.1f}" for name, score in scores.items())
    return f"\nSolved on the test maps by who knows nothing of the costs, per cent: {listed}.\n"
