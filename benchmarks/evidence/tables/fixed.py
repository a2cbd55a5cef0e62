"""The table of the runs at the paper's own scale (``training/fixed.py``)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.tables.markdown import lines, number
from benchmarks.evidence.training import plan
from benchmarks.evidence.training.arms import ARMS, BASELINE

__all__ = ["fixed_table"]


def fixed_table(done: plan.Done, every: Mapping[str, Problem]) -> str:
    """Markdown: final test scores of every arm at every rate, with the paired differences to plain at the same rate."""
    rows = list(done.values())
    made = sorted(
        {f"newton_plugin {r['newton_plugin']} ({r['commit']}), torch {r['torch']}, {r['device']}" for r in rows}
    )
    parts = [
        "# Evidence: the paper's scale, reduced",
        "Made by `python -m benchmarks.evidence tables` from evidence/ranking_paper.jsonl: numbers of "
        "four digits from MNIST, the paper's CNN, batches of 100 lists, Adam with a cosine to zero; far fewer steps "
        "than the paper's 100,000, few seeds, **no tuning and no test of significance**. Lists of the test images "
        "ranked fully right, per cent: mean (smallest to largest seed); then the difference to plain, stable at the "
        f"same rate and seed. {'; '.join(made)}.",
    ]
    for name in dict.fromkeys(run.problem for run in done):
        runs = {run: row for run, row in done.items() if run.problem == name}
        for steps in sorted({run.steps for run in runs}):
            some = {run: row for run, row in runs.items() if run.steps == steps}
            sharp = next(iter(some)).sharpness
            parts += [f"## {every[name].title} ({steps:,} steps, sharpness {number(sharp)})", _rows(some)]
    return "\n\n".join(parts) + "\n"


def _rows(runs: plan.Done) -> str:
    rates = sorted({run.learning_rate for run in runs})
    scores: dict[tuple[str, float, int], dict[int, float]] = {}
    for run, row in runs.items():
        for point in (1, -1):
            value = row["curve"][point][2] if row["finite"] else 0.0
            scores.setdefault((run.arm, run.learning_rate, point), {})[run.seed] = value
    header = ["arm", *(f"{title}, rate {number(rate)}" for rate in rates for title in ("a fifth", "the end"))]
    rows = []
    for arm in [arm for arm in ARMS if any(run.arm == arm for run in runs)]:
        cells = []
        for rate in rates:
            for point in (1, -1):
                ours, base = scores.get((arm, rate, point), {}), scores.get((BASELINE, rate, point), {})
                cells.append(_cell(ours, base if arm != BASELINE else {}))
        rows.append([arm, *cells])
    return lines(header, rows)


def _cell(ours: Mapping[int, float], base: Mapping[int, float]) -> str:
    if not ours:
        return ""
    values = [*ours.values()]
    text = f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
    paired = [ours[seed] - base[seed] for seed in ours if seed in base]
    return text if not paired else f"{text}; {statistics.mean(paired):+.1f} ({min(paired):+.1f} to {max(paired):+.1f})"
