"""Which runs a table or a search consists of, in groups that are trained together."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.training.arms import ARMS, BASELINE, CANDIDATES, SEARCH_RATES, configurations
from benchmarks.evidence.training.runs import REPORT_SEEDS, SEARCH_SEEDS, TUNING_SEEDS, Purpose, Run

__all__ = [
    "PANEL",
    "Done",
    "best_run",
    "chosen",
    "final",
    "report_runs",
    "search_runs",
    "sharpness",
    "sharpness_runs",
    "tuning_runs",
]

Done = Mapping[Run, dict[str, Any]]

PANEL = (
    "neural_sort_5",
    "soft_sort_5",
    "single_10",
    "single_sharp",
    "wrong_lists",
    "wrong_labels",
    "two_layers_adam",
    "batch_4",
    "fenchel_young_3",
    "algorithm_difference_10",
    "loss_score_10",
    "cauchy_5",
    "logistic_5",
    "for_l2",
    "while_l1",
)
"""The search's problems; those that take longest last."""

SEARCH_STEPS = 600


def final(row: Mapping[str, Any]) -> float:
    """Validation score at the end; zero if the run left the finite numbers."""
    return row["curve"][-1][1] if row["finite"] else 0.0


def search_runs(problem: Problem, arm: str, seeds: int, data: str = "digits") -> list[Run]:
    """Candidates and arms at the same three learning rates; a second number in the middle of its grid."""
    known = {**ARMS, **CANDIDATES}[arm]
    second = known.second[len(known.second) // 2] if known.second else None
    middle = problem.sharpnesses[len(problem.sharpnesses) // 2] if problem.sharpnesses else None
    steps = min(problem.steps, SEARCH_STEPS)
    return [
        Run(problem.name, arm, rate, second, middle, steps, problem.batch, seed, "search", data)
        for seed in SEARCH_SEEDS[:seeds]
        for rate in SEARCH_RATES
    ]


def _run(problem: Problem, arm: str, rate: float, second: float | None, sharp: float | None, seed: int,
         purpose: Purpose, data: str, scale: str) -> Run:  # fmt: skip
    return Run(problem.name, arm, rate, second, sharp, problem.steps, problem.batch, seed, purpose, data, scale)


def sharpness_runs(problem: Problem, data: str, scale: str) -> list[Run]:
    """The baseline at all sharpnesses of the loss; none if there is nothing to choose."""
    if len(problem.sharpnesses) < 2:
        return []
    return [
        _run(problem, BASELINE, rate, None, sharp, seed, "tune", data, scale)
        for sharp in problem.sharpnesses
        for rate in SEARCH_RATES
        for seed in TUNING_SEEDS
    ]


def sharpness(problem: Problem, data: str, scale: str, done: Done) -> float | None:
    """The baseline's best, or the only one.

    Raises:
        LookupError: the runs that decide it have no lines yet.
    """
    if len(problem.sharpnesses) < 2:
        return problem.sharpnesses[0] if problem.sharpnesses else None
    return best_run(sharpness_runs(problem, data, scale), done).sharpness


def tuning_runs(problem: Problem, arm: str, sharp: float | None, data: str, scale: str) -> list[Run]:
    """Every configuration on three seeds."""
    return [
        _run(problem, arm, rate, second, sharp, seed, "tune", data, scale)
        for rate, second in configurations(ARMS[arm], problem.optimizer, data)
        for seed in TUNING_SEEDS
    ]


def chosen(problem: Problem, arm: str, sharp: float | None, data: str, scale: str, done: Done) -> Run:
    """A run with the configuration that tuning chose.

    Raises:
        LookupError: a tuning run has no line yet.
    """
    return best_run(tuning_runs(problem, arm, sharp, data, scale), done)


def report_runs(problem: Problem, best: Run, data: str, scale: str) -> list[Run]:
    """The chosen configuration on the report's seeds."""
    return [
        _run(problem, best.arm, best.learning_rate, best.second, best.sharpness, seed, "report", data, scale)
        for seed in REPORT_SEEDS
    ]


def best_run(runs: Iterable[Run], done: Done) -> Run:
    """A run of the configuration with the largest mean over its seeds; the first of equals."""
    means: dict[tuple, list[float]] = {}
    first: dict[tuple, Run] = {}
    for run in runs:
        if run not in done:
            raise LookupError(f"{run} has no line yet.")
        key = (run.learning_rate, run.second, run.sharpness)
        means.setdefault(key, []).append(final(done[run]))
        first.setdefault(key, run)
    return first[max(means, key=lambda key: statistics.mean(means[key]))]
