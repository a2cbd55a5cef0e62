"""The file of finished runs: a header that says what is compared, then one JSON line for each run, in the plan's order.

After every run the whole file is written beside the old one and takes its place at once, so that a kill leaves either
file complete. Lines hold no dates and no durations: an interrupted comparison ends with the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from newton_plugin_lightning._compare.errors import ComparisonError
from newton_plugin_lightning._compare.plan import Plan, Run
from newton_plugin_lightning._compare.statistics import LEVEL, smallest_p

__all__ = ["Line", "Lines"]

_FORMAT = 1


@dataclass(frozen=True)
class Line:
    """What is kept of a finished run.

    Attributes:
        seed, arm, rate: which run.
        value: of the metric when training ended; None if the run failed.
        failed: why, or None.
        learning_rates: of the optimizers' parameter groups at the first step, the factor included.
        curve: (step, value) pairs of the metric during training.
        warnings: of this package, each once.
    """

    seed: int
    arm: str
    rate: float
    value: float | None
    failed: str | None
    learning_rates: Sequence[float]
    curve: Sequence[Sequence[float]]
    warnings: Sequence[str]

    @property
    def key(self) -> tuple[int, str, float]:
        """The run's key."""
        return self.seed, self.arm, self.rate


class Lines:
    """The lines of one comparison in one file.

    Args:
        path: where; made if absent, read if it is there.
        plan: whose runs they are.
        trained: what is trained, as a fingerprint: names of parts and their values as strings.

    Raises:
        ComparisonError: the file is of another comparison; the message names what differs.
    """

    def __init__(self, path: Path, plan: Plan, trained: dict[str, str]) -> None:
        self.path = path
        self._order = {run.key: position for position, run in enumerate(plan.runs())}
        self._header = {
            "newton_plugin_compare": _FORMAT,
            "metric": plan.metric,
            "mode": plan.mode,
            "seeds": list(plan.seeds),
            "arms": {arm.name: arm.describe() for arm in plan.arms},
            "rates": list(plan.rates),
            **trained,
        }
        self.lines: dict[tuple[int, str, float], Line] = {}
        if path.exists():
            header, *rest = path.read_text().splitlines()
            self._check(json.loads(header))
            read = [Line(**json.loads(line)) for line in rest]
            self.lines = {line.key: line for line in read}

    def missing(self, runs: Sequence[Run]) -> list[Run]:
        """The runs that have no line yet."""
        return [run for run in runs if run.key not in self.lines]

    def add(self, line: Line) -> None:
        """Keep a line, on the disk before this returns."""
        self.lines[line.key] = line
        ordered = sorted(self.lines.values(), key=lambda line: self._order[line.key])
        text = "".join(json.dumps(part) + "\n" for part in (self._header, *map(asdict, ordered)))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        with open(new, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)

    def _check(self, found: dict[str, Any]) -> None:
        for name in sorted(self._header.keys() | found.keys(), key=str):
            before, now = found.get(name), self._header.get(name)
            if before == now or (name == "seeds" and self._may_go_on(before, now)):
                continue
            raise ComparisonError(
                f"{self.path} holds a comparison with another {name}: {_short(before)} there, {_short(now)} now. "
                f"{_WHY.get(name, '')}Take another --out, or the same {name}."
            )

    def _may_go_on(self, before: Any, now: Any) -> bool:
        """More seeds may be added while no p-value could have been small enough to stop at."""
        no_finding = smallest_p(len(before), len(self._header["arms"]) - 1) > LEVEL
        return no_finding and len(now) > len(before) and now[: len(before)] == before


_WHY = {
    "seeds": "Seeds that are added or left out after a look at the figures make p-values too small. ",
    "arms": "Arms that are added or left out after a look at the figures change what p-values mean. ",
}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."
