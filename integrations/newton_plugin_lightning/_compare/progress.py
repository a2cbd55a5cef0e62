"""How far the runs are: a bar with the time left where rich and a terminal are there, else a line for each run."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from newton_plugin_lightning._compare.lines import Line
from newton_plugin_lightning._compare.plan import rate_word

__all__ = ["Progress", "progress"]


class Progress(Protocol):
    """What is told of each finished run."""

    def finished(self, line: Line) -> None:
        """A run is done."""
        ...


@contextmanager
def progress(total: int, done: int) -> Iterator[Progress]:
    """Show ``total`` runs of which ``done`` are there already, on the standard error."""
    bar = _rich() if sys.stderr.isatty() else None
    if bar is None:
        yield _Lines(total, done)
        return
    with bar:
        yield _Bar(bar, total, done)


def _rich() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        return None
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("left:")
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), speed_estimate_period=600)


class _Bar:
    def __init__(self, bar: Any, total: int, done: int) -> None:
        self.bar, self.task = bar, bar.add_task("runs", total=total, completed=done)

    def finished(self, line: Line) -> None:
        self.bar.update(self.task, advance=1, description=_said(line))


class _Lines:
    def __init__(self, total: int, done: int) -> None:
        self.total, self.before, self.done, self.began = total, done, done, time.monotonic()

    def finished(self, line: Line) -> None:
        self.done += 1
        each = (time.monotonic() - self.began) / (self.done - self.before)
        left = each * (self.total - self.done)
        print(f"run {self.done} of {self.total}: {_said(line)}; {_duration(left)} left", file=sys.stderr, flush=True)


def _said(line: Line) -> str:
    result = f"failed, {line.failed}" if line.value is None else f"{line.value:.4g}"
    return f"seed {line.seed}, {line.arm} {rate_word(line.rate)}: {result}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
