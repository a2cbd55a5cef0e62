"""The runs of the table ``damping``: what a fixed damping does to each curvature, over six powers of ten."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.training.arms import ARMS, BASELINE, SEARCH_RATES, Arm
from benchmarks.evidence.training.plan import SEARCH_STEPS
from benchmarks.evidence.training.runs import SEARCH_SEEDS, Run

import newton_plugin as npl

__all__ = ["CURVATURES", "DAMPED", "DAMPINGS", "PROBLEMS", "damping_groups", "fixed"]

PROBLEMS = ("single_10", "logistic_5")
DAMPINGS = (1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0, 1e3)
CURVATURES = ("Fisher", "Hessian", "Hessian per sample")
"""Arms with damping "auto"; each has a twin with a fixed one."""


def fixed(curvature: str) -> str:
    """The name of an arm's twin with a fixed damping."""
    return f"{curvature}, fixed"


def _per_sample(second: float | None) -> tuple[npl.Curvature, npl.Damping]:
    assert second is not None
    return npl.Hessian("per_sample"), npl.Tikhonov(second)


DAMPED: dict[str, Arm] = {
    fixed("Fisher"): ARMS[fixed("Fisher")],
    fixed("Hessian"): ARMS[fixed("Hessian")],
    fixed("Hessian per sample"): Arm(_per_sample, second=DAMPINGS),
}
"""The arms of this table with a fixed damping; one more than the report has."""


def damping_groups(problem: Problem, sharp: float | None, data: str) -> Iterator[list[Run]]:
    """The baseline, each curvature with damping "auto" and at each fixed damping; runs that are trained together.

    As in the search for a rule: its eight seeds, its three learning rates, validation data. No test data.
    """
    steps = min(problem.steps, SEARCH_STEPS)
    arms: list[tuple[str, float | None]] = [(BASELINE, None), *((c, None) for c in CURVATURES)]
    arms += [(fixed(c), damping) for c in CURVATURES for damping in DAMPINGS]
    for arm, second in arms:
        yield [
            Run(problem.name, arm, rate, second, sharp, steps, problem.batch, seed, "search", data)
            for seed in SEARCH_SEEDS
            for rate in SEARCH_RATES
        ]
