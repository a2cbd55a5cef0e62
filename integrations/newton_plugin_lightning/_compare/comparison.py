"""Puts a comparison together: plan, runs, file, figures, and what is written about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from newton_plugin import ArgumentError
from newton_plugin_lightning._compare.arms import arms_from_mapping, arms_from_words
from newton_plugin_lightning._compare.errors import ComparisonError
from newton_plugin_lightning._compare.fit_functions import FitFunctions
from newton_plugin_lightning._compare.lines import Line, Lines
from newton_plugin_lightning._compare.one_run import Outcome, Task
from newton_plugin_lightning._compare.picture import draw
from newton_plugin_lightning._compare.plan import Plan, Run, check_plan
from newton_plugin_lightning._compare.progress import progress
from newton_plugin_lightning._compare.results import Results, results_of
from newton_plugin_lightning._compare.table import report
from newton_plugin_lightning._compare.verdict import verdict
from newton_plugin_lightning._compare.workers import outcomes

__all__ = ["ARMS", "RATES", "SEEDS", "Comparison", "carry_out", "compare"]

ARMS = ("plain", "default", "norm")
RATES = (1 / 3, 1.0, 3.0)
SEEDS = 8


@dataclass(frozen=True)
class Comparison:
    """What a comparison found.

    Attributes:
        verdict: one sentence.
        report: the tables in Markdown, as in ``out/table.md``; printed by ``print(comparison)``.
        results: the figures: ``rows`` (each arm at each rate) and ``against`` (each arm against plain training).
        out: the folder with ``runs.jsonl``, ``table.md`` and ``curves.png``.
    """

    verdict: str
    report: str
    results: Results
    out: Path

    def __str__(self) -> str:
        return self.report


def compare(
    make_module: Callable[[], Any],
    make_data: Callable[[], Any] | None = None,
    *,
    metric: str,
    mode: Literal["max", "min"],
    out: str | Path,
    seeds: int | Sequence[int] = SEEDS,
    arms: Sequence[str] | Mapping[str, Mapping[str, Any]] = ARMS,
    rates: Sequence[float] = RATES,
    workers: int = 1,
    keep_checkpoints: bool = False,
    **trainer_kwargs: Any,
) -> Comparison:
    """Train a module with and without Newton Losses, paired by seed, and say whether they help.

    Every arm is trained at the same learning rates with the same seeds; each is judged at its best rate, and the
    p-value knows that rates were chosen (docs/compare.md). Finished runs are kept in ``out/runs.jsonl``: the same call
    goes on where it was stopped. Runs write no logs and show no bars; each has one thread and one device, the GPU if
    there is one.

    Args:
        make_module: a function without arguments that returns a new LightningModule; called once for each run, after
            everything is seeded.
        make_data: the same for a LightningDataModule, or for loaders: a training loader, or a tuple of a training and a
            validation loader. None: the module has its loaders.
        metric: a name that the module logs; its value at the end of ``fit`` counts.
        mode: "max" if larger is better, "min" if smaller is.
        out: a folder; made if absent.
        seeds: how many, from 0 on, or which. With two arms beside plain 7 can show a difference.
        arms: names ("plain", "default", "norm", "normalised", "clipped", or "name:argument=value"), or a mapping of
            names to the arguments of their ``NewtonLosses``. Plain training is always among them.
        rates: what the module's own learning rate is multiplied by, 1 among them.
        workers: processes. For more than one both functions must be importable (no lambdas), and a script calls this
            below ``if __name__ == "__main__":``.
        keep_checkpoints: turn checkpoints on, in ``out/checkpoints``.
        trainer_kwargs: of the Trainer: ``max_epochs=20``. ``callbacks`` is a function that returns a list.

    Raises:
        ArgumentError, ArgumentTypeError: a value outside its rule.
        ComparisonError: the metric is not logged, plain training itself fails, or ``out`` holds another comparison.
    """
    chosen = arms_from_mapping(arms) if isinstance(arms, Mapping) else arms_from_words(arms)
    if any(arm.kind == "yours" for arm in chosen):
        raise ArgumentError("arms: 'yours' is the callback of a configuration, and there is none. Write its arguments.")
    task = FitFunctions(make_module, make_data, trainer_kwargs)
    plan = check_plan(metric, mode, seeds, chosen, rates)
    return carry_out(task, plan, task.identity(), Path(out), workers, keep_checkpoints)


def carry_out(
    task: Task,
    plan: Plan,
    trained: dict[str, str],
    out: Path,
    workers: int = 1,
    keep_checkpoints: bool = False,
    notes: Sequence[str] = (),
) -> Comparison:
    """Make the runs that are missing, then the figures, the table and the picture.

    Args:
        task: trains.
        plan: all runs.
        trained: the fingerprint of the task.
        out: the folder.
        workers: processes.
        keep_checkpoints: in ``out/checkpoints``.
        notes: for the report.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ArgumentError(f"workers must be a number of processes, at least 1; got {workers!r}.")
    kept = Lines(out / "runs.jsonl", plan, trained)
    runs = plan.runs()
    missing = kept.missing(runs)
    with progress(len(runs), len(runs) - len(missing)) as shown:
        checkpoints = str(out / "checkpoints") if keep_checkpoints else None
        for outcome in outcomes(task, missing, plan.metric, workers, checkpoints):
            _check(outcome, runs[0], kept)
            kept.add(outcome.line)
            shown.finished(outcome.line)
    return _written(plan, kept.lines, out, notes)


def _check(outcome: Outcome, first: Run, kept: Lines) -> None:
    """Stop where going on is of no use: the metric's name is wrong, or the user's own training does not run."""
    metric_seen = any(line.value is not None for line in kept.lines.values())
    if outcome.logged is not None and not metric_seen:
        names = ", ".join(outcome.logged) or "nothing"
        raise ComparisonError(f"metric must be a name that was logged in training: {names}; got {outcome.line.failed}.")
    if outcome.line.key == first.key and outcome.trace:
        raise ComparisonError(
            f"plain training at your own learning rate fails, so there is nothing to compare with. "
            f"{str(outcome.line.failed).rstrip('.')}. Mend it, then run again.\n{outcome.trace}"
        )


def _written(plan: Plan, lines: dict[tuple[int, str, float], Line], out: Path, notes: Sequence[str]) -> Comparison:
    results = results_of(plan, lines)
    warned = sorted({f"{line.arm} warned: {text}" for line in lines.values() for text in line.warnings})
    without = draw(results, lines, out / "curves.png")
    page = report(results, [*notes, *warned, *([without] if without else [])])
    (out / "table.md").write_text(page)
    return Comparison(verdict(results), page, results, out)
