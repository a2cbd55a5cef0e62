"""The paper's own scale, where tuning is out of reach: a few report seeds at given learning rates, all of them shown.

Nothing is chosen here but the sharpness, which is what tuning chose for the baseline at the scale cpu.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from benchmarks.evidence import plan
from benchmarks.evidence.arms import ARMS, BASELINE
from benchmarks.evidence.markdown import lines, number
from benchmarks.evidence.problems import Problem
from benchmarks.evidence.runs import REPORT_SEEDS, Run

__all__ = ["FIXED_ARMS", "fixed_groups", "fixed_table"]

FIXED_ARMS = (
    BASELINE,
    "plain, textbook",
    "normalised",
    "soft normalisation",
    "isotropic",
    "batch size",
    "Fisher",
    "Hessian",
)
"""Those without a second number, which nobody has chosen at this scale."""


def fixed_groups(
    problem: Problem,
    small: Problem,
    chosen: plan.Done,
    arms: Sequence[str],
    rates: Sequence[float],
    seeds: int,
    data: str,
) -> Iterator[list[Run]]:
    """Runs that are trained together, one group for each arm.

    Args:
        problem: at the paper's scale.
        small: the same at the scale cpu; ``chosen`` has its lines.
        arms, rates, seeds: what is run: every arm at every rate, on the first report seeds.
        data: the folder of the images.
    """
    sharp = plan.sharpness(small, "digits", "cpu", chosen)
    for arm in arms:
        yield [
            replace(
                Run(problem.name, arm, rate, None, sharp, problem.steps, problem.batch, seed, "report", data),
                scale="paper",
            )
            for rate in rates
            for seed in REPORT_SEEDS[:seeds]
        ]


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
