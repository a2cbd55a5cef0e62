"""``Run``, one training, and ``Lines``, the JSON-lines file with the results of each run."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

__all__ = ["FRESH_SEEDS", "REPORT_SEEDS", "SEARCH_SEEDS", "TUNING_SEEDS", "Lines", "Purpose", "Run"]

Purpose = Literal["search", "tune", "report"]
SEARCH_SEEDS = range(2000, 2008)
TUNING_SEEDS = range(1000, 1003)
REPORT_SEEDS = range(5000, 5016)
FRESH_SEEDS = range(6000, 6016)  # for what was chosen after the report's had been looked at (protocol, 17)


@dataclass(frozen=True)
class Run:
    """Equal fields, equal result (with the same version of the package).

    Attributes:
        problem, arm: their names.
        learning_rate: at the first step.
        second: the arm's other number (a damping, a clipping norm); None if it has none.
        sharpness: of the loss (temperature, steepness); None if it has none.
        steps, batch, seed: of the training.
        purpose: which seeds, and whether test data may be seen.
        data: "digits", or the name of the folder with other images.
        scale: "cpu" or "paper".
    """

    problem: str
    arm: str
    learning_rate: float
    second: float | None
    sharpness: float | None
    steps: int
    batch: int
    seed: int
    purpose: Purpose
    data: str = "digits"
    scale: str = "cpu"


_NAMES = tuple(f.name for f in fields(Run))


class Lines:
    """An append-only file of rows, one for each finished run; reads what other processes have added.

    Args:
        path: of the file; made at the first line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, in their order. A last line that was cut off by an interruption is left out."""
        if not self.path.exists():
            return
        for line in self.path.read_text().splitlines():
            if line.startswith("{") and line.endswith("}"):
                yield json.loads(line)

    def by_run(self) -> dict[Run, dict[str, Any]]:
        """Rows of runs; of equal runs the first counts."""
        found: dict[Run, dict[str, Any]] = {}
        for row in self.rows():
            if "problem" in row and "curve" in row:
                found.setdefault(Run(**{name: row[name] for name in _NAMES}), row)
        return found

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Those that have no line yet."""
        done = self.by_run()
        return [run for run in runs if run not in done]

    def append(self, run: Run, result: dict[str, Any]) -> None:
        """One line, written as a whole though several processes append to the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, 2)
            file.seek(max(0, end - 1))
            cut_off = end > 0 and file.read(1) != b"\n"  # an interrupted line before this one
            file.write((b"\n" if cut_off else b"") + json.dumps(asdict(run) | result).encode() + b"\n")
