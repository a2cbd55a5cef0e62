"""Which runs the table of the live problems consists of, and the comparison at the learning rate of plain training."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.evidence.live.problems import LiveProblem
from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.training import plan
from benchmarks.evidence.training.arms import ARMS, BASELINE
from benchmarks.evidence.training.runs import FRESH_SEEDS, TUNING_SEEDS, Run

__all__ = ["at_rate_of_plain", "report_runs", "tuning_runs"]


def tuning_runs(problem: LiveProblem, arm: str) -> list[Run]:
    """Every configuration of an arm on the tuning seeds."""
    return [
        Run(problem.name, arm, rate, second, None, problem.steps, problem.batch, seed, "tune")
        for rate, second in problem.configurations(arm)
        for seed in TUNING_SEEDS
    ]


def report_runs(problem: LiveProblem, arm: str, done: plan.Done) -> list[Run]:
    """What tuning chose for an arm, on the report's seeds.

    Raises:
        LookupError: a tuning run has no line yet.
    """
    best = plan.best_run(tuning_runs(problem, arm), done)
    return plan.report_runs(problem, best, "digits", "cpu")  # type: ignore[arg-type]


def at_rate_of_plain(
    problem: Problem | LiveProblem,
    arm: str,
    tuned: plan.Done,
    data: str = "digits",
    scale: str = "cpu",
    fresh: bool = False,
) -> list[Run]:
    """An arm on the report's seeds at the learning rate and sharpness that tuning chose for plain training.

    It answers who switches a rule on and tunes nothing anew. A second number is the middle one of the arm's grid, as in
    the search for a rule. Lines go to a file of their own, since the same runs may be the tuned ones of another file.

    Args:
        problem: of ``live`` or of the registry.
        tuned: lines of the problem's table, with plain's tuning.
        data, scale: of the runs.
        fresh: on seeds that nobody has looked at, in place of the report's.

    Raises:
        LookupError: a tuning run of plain training has no line yet.
    """
    if isinstance(problem, LiveProblem):
        best = plan.best_run(tuning_runs(problem, BASELINE), tuned)
    else:
        best = plan.chosen(problem, BASELINE, plan.sharpness(problem, data, scale, tuned), data, scale, tuned)
    seconds = ARMS[arm].second
    middle = seconds[len(seconds) // 2] if seconds else None
    runs = plan.report_runs(problem, replace(best, arm=arm, second=middle), data, scale)  # type: ignore[arg-type]
    return [replace(run, seed=seed) for run, seed in zip(runs, FRESH_SEEDS, strict=True)] if fresh else runs
