"""What is trained: runs of the tasks, resumed from their lines."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.evidence.training.runs import Lines, Purpose, Run
from benchmarks.evidence.training.train import versions
from benchmarks.suspects.confident import confident, out_of_sample
from benchmarks.suspects.scores import areas
from benchmarks.suspects.tasks import COUNT, DOSES, Data, Task
from benchmarks.suspects.training import BATCH, EPOCHS, watched

__all__ = ["FOLDED", "RATES", "SEEDS", "TRAININGS", "Done", "best_rate", "complete", "dose_of", "runs_of"]

RATES = (3e-3, 1e-2, 3e-2)
SEEDS: dict[Purpose, range] = {"tune": range(2000, 2004), "report": range(5000, 5008)}
TRAININGS = ("plain", "gated")
FOLDED = "five folds"
STEPS = EPOCHS * (COUNT // BATCH)
Done = Mapping[Run, Mapping[str, Any]]


def runs_of(task: Task, arm: str, rates: Sequence[float], purpose: Purpose) -> list[Run]:
    """All doses and seeds of one arm: "plain", "gated" or "five folds"."""
    return [
        Run(f"{task.name}_{dose:02d}", arm, rate, None, task.sharpness, STEPS, BATCH, seed, purpose)
        for rate in rates
        for dose in DOSES
        for seed in SEEDS[purpose]
    ]


def dose_of(run: Run) -> int:
    """Per cent."""
    return int(run.problem.rpartition("_")[2])


def best_rate(task: Task, done: Done) -> float:
    """Of plain training, by the mean accuracy on validation images; of equals the smaller one.

    Raises:
        LookupError: a run of the tuning has no line.
    """
    means = {
        rate: statistics.mean(done[run]["curve"][-1][1] for run in runs_of(task, "plain", [rate], "tune"))
        for rate in RATES
    }
    return max(RATES, key=means.__getitem__)


def complete(task: Task, lines: Lines, with_folds: bool) -> Iterable[str]:
    """Train what has no line yet; yields what was done."""
    yield _train(task, lines, "plain", RATES, "tune")
    rate = best_rate(task, lines.by_run())
    arms = [*TRAININGS, FOLDED] if with_folds and task.has_classes else TRAININGS
    for purpose in SEEDS:
        for arm in arms:
            yield _train(task, lines, arm, [rate], purpose)


def _train(task: Task, lines: Lines, arm: str, rates: Sequence[float], purpose: Purpose) -> str:
    runs = lines.missing(runs_of(task, arm, rates, purpose))
    if runs:
        for run, result in zip(runs, _results(task, arm, runs), strict=True):
            lines.append(run, result | versions())
    return f"{task.name}, {arm}, {purpose}, {', '.join(f'{rate:g}' for rate in rates)}: {len(runs)} runs"


def _results(task: Task, arm: str, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The runs, trained side by side: each as it would be alone."""
    data = [task.draw(dose_of(run), run.seed) for run in runs]
    seeds, rates = [run.seed for run in runs], [run.learning_rate for run in runs]
    if arm == FOLDED:
        found = out_of_sample(task, data, seeds, rates)
        return [_result([], areas(confident(d.targets, p), d.wrong), d) for d, p in zip(data, found, strict=True)]
    networks, scores = watched(task, data, seeds, rates, arm == "gated")
    inputs, targets = task.problem.held_out("validation")
    accuracy = 100 * task.problem.score(networks.evaluate(inputs), targets).mean(-1)
    return [
        _result([[float(STEPS), round(reached, 3)]], areas(s, d.wrong), d)
        for reached, s, d in zip(accuracy.tolist(), scores, data, strict=True)
    ]


def _result(curve: list[list[float]], found: dict[str, float], data: Data) -> dict[str, Any]:
    return {"curve": curve, "wrong": int(data.wrong.sum()), "auroc": found}
