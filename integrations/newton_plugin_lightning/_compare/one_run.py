"""One run: train by a task with the callbacks of an arm, and make a line of what happened."""

from __future__ import annotations

import contextlib
import math
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from newton_plugin_lightning._callback import NewtonLosses
from newton_plugin_lightning._compare.alone import alone
from newton_plugin_lightning._compare.controls import UsualLength
from newton_plugin_lightning._compare.follow import Follow
from newton_plugin_lightning._compare.lines import Line
from newton_plugin_lightning._compare.plan import Run
from newton_plugin_lightning._compare.tuning import MultiplyRate

__all__ = ["Outcome", "Task", "quiet_options", "train"]


class Task(Protocol):
    """Where module and data come from."""

    def fit(self, run: Run, callbacks: list[Any], options: dict[str, Any]) -> Any:
        """Seed everything with ``run.seed``, make module and data, fit, and return the Trainer."""
        ...


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        line: what is kept of it.
        logged: the names that were logged, if the metric is not among them.
        trace: of the exception that ended it, for people.
    """

    line: Line
    logged: tuple[str, ...] | None = None
    trace: str = ""


def quiet_options(device: int, checkpoints: str | None) -> dict[str, Any]:
    """The Trainer's options in every run: one device, and nothing written or shown.

    Args:
        device: which GPU, where there are several.
        checkpoints: a folder for checkpoints; None: none are written.
    """
    gpus = torch.cuda.device_count()
    return {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "devices": [device % gpus] if gpus > 1 else 1,
        "num_nodes": 1,
        "strategy": "auto",
        "enable_checkpointing": checkpoints is not None,
        **({} if checkpoints is None else {"default_root_dir": checkpoints}),
    }


def train(task: Task, run: Run, metric: str, options: dict[str, Any]) -> Outcome:
    """Train once. Exceptions of the training are its outcome; an interrupt goes on."""
    follow, rate = Follow(metric), MultiplyRate(run.rate)
    told: list[str] = []
    value, logged, trace = None, None, ""
    try:
        with alone(), _heard(told):
            trainer = task.fit(run, [*_callbacks(run), rate, follow], options)
        if trainer.interrupted:  # older Lightnings return after Ctrl-C
            raise KeyboardInterrupt
        value, failed = follow.value(trainer), None
        if value is None:
            failed, logged = f"{metric} was not logged", tuple(sorted(trainer.callback_metrics))
        elif not math.isfinite(value):
            value, failed = None, f"{metric} is {value}"
    except Exception as error:
        failed, trace = _in_short(error), _trace(error)
    curve = [list(point) for point in follow.thinned()]
    line = Line(run.seed, run.arm.name, run.rate, value, failed, rate.learning_rates, curve, sorted(set(told)))
    return Outcome(line, logged, trace)


def _callbacks(run: Run) -> list[Any]:
    if run.arm.kind == "newton":
        return [NewtonLosses(**run.arm.arguments)]
    if run.arm.kind == "normalised" or run.arm.kind == "clipped":
        return [UsualLength(run.arm.kind)]
    return []


@contextlib.contextmanager
def _heard(told: list[str]) -> Iterator[None]:
    """Warnings are not shown once for each run; this package's own go into ``told``."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        yield
    told += [text for w in seen if "newton" in (text := " ".join(str(w.message).split())).lower()]


def _in_short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))
