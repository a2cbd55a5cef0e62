"""Runs at the paper's own scale, where tuning is out of reach: a few report seeds at given learning rates.

Every rate is shown in the table (``tables/fixed.py``). The sharpness is the one that tuning chose for the baseline at
the scale cpu; nothing else is chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.training import plan
from benchmarks.evidence.training.arms import BASELINE
from benchmarks.evidence.training.runs import REPORT_SEEDS, Run

__all__ = ["FIXED_ARMS", "fixed_groups"]

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
"""Arms without a second number, because nobody has chosen one at this scale."""


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
