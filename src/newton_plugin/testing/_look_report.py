"""What :func:`newton_plugin.testing.look` found, in words and as a picture."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor

from newton_plugin._doors.found import FoundBoundary
from newton_plugin.testing._advice import Advice
from newton_plugin.testing._look_picture import draw
from newton_plugin.testing._report import LossReport
from newton_plugin.testing._watching import Watched

__all__ = ["Checked", "Cost", "LookReport"]


@dataclass(frozen=True)
class Cost:
    """What a step takes.

    Attributes:
        plain: seconds without the package, the median.
        ratio: with the package over without, the median of ratios of neighbours.
        pairs: of how many.
        of: what was timed, in words.
        rule: with which the package was timed.
    """

    plain: float
    ratio: float
    pairs: int
    of: str
    rule: str

    @classmethod
    def of_pairs(cls, times: Sequence[tuple[float, float]], of: str, rule: str) -> Cost:
        """From seconds without and with the package, taken in turn."""
        return cls(median(plain for plain, _ in times), median(b / a for a, b in times), len(times), of, rule)

    def __str__(self) -> str:
        milliseconds = 1e3 * self.plain
        return (
            f"{self.ratio:.2f} times {self.of} of {milliseconds:.3g} ms, with {self.rule} (median of {self.pairs} "
            "pairs, alternating)"
        )


@dataclass(frozen=True)
class Checked:
    """``check_loss`` at one boundary.

    Attributes:
        report: None where the loss could not be had as a function of these outputs.
        why_not: the reason; empty with a report.
        sizes, errors: ``|g_i|`` in float64, and how far that in float32 is from it, (N,); None: not compared.
    """

    report: LossReport | None
    why_not: str = ""
    sizes: Tensor | None = None
    errors: Tensor | None = None


@dataclass(frozen=True)
class LookReport:
    """What a few plain steps show. ``print`` it; ``draw`` it.

    Attributes:
        steps: how many were looked at.
        boundaries: where outputs meet the loss: name, shape, samples, features, what lies beside.
        watched: for each boundary's name the two numbers of docs/when-it-helps.md and the readings of docs/gated.md:
            ``tail(late)``, ``spread(late)``, ``reading("gate")``, ``reading("contradiction")``, ``reading("signal")``.
        checks: for each boundary's name ``check_loss`` on the last batch.
        cost: None where nothing was timed.
        advice: what to take, and why; see :class:`LossReport`.
    """

    steps: int
    boundaries: Sequence[FoundBoundary]
    watched: Mapping[str, Watched]
    checks: Mapping[str, Checked]
    cost: Cost | None
    advice: Advice

    @property
    def main(self) -> str:
        """The boundary with the largest gradients, by name: the advice is about it."""
        return max(self.watched, key=lambda name: self.watched[name].square)

    def __str__(self) -> str:
        lines = [f"{self.steps} plain steps"]
        for boundary in self.boundaries:
            lines += ["", *_wrapped(f"Outputs {boundary}")]
            lines += [line for name, value in self._rows(boundary) for line in _row(name, value)]
        lines += ["", *_wrapped("Cost: " + (str(self.cost) if self.cost else "not timed"))]
        for name, checked in self.checks.items():
            if checked.report is None:
                lines += ["", *_wrapped(f"check_loss at {name!r} was not possible: {checked.why_not}.")]
            else:
                body = str(checked.report).rsplit("\nRecommended:", 1)[0]
                lines += ["", f"check_loss at {name!r}, last batch: {body}"]
        return "\n".join([*lines, "", *_wrapped(str(self.advice))])

    def _rows(self, boundary: FoundBoundary) -> list[tuple[str, str]]:
        watched = self.watched[boundary.name]
        gate, cosine, signal = (watched.reading(name) for name in ("gate", "contradiction", "signal"))
        read = "nothing to be seen" if math.isnan(cosine) else f"{cosine:.2f}, gate {gate:.2f}, signal {signal:.2f}"
        rows = [
            ("beside", ", ".join(boundary.beside) or "nothing"),
            ("left out", "; ".join(boundary.left_out)),
            ("last layer", boundary.last_layer),
            ("tail", f"{_share(watched.tail(False))} at first, {_share(watched.tail())} at the end"),
            ("spread", f"{watched.spread(False):.1f} at first, {watched.spread():.1f} at the end"),
            ("contradiction", read),
        ]
        return [(name, value) for name, value in rows if value]

    def draw(self, figure: Any) -> None:
        """Draw into an empty figure of matplotlib: ``report.draw(plt.figure(figsize=(11, 3.4)))``.

        Eigenvalues of C = ``mean g g'`` over the steps; the sizes of the samples' gradients at first and at the end;
        the error of each sample's gradient in float32 against its size.
        """
        checked = self.checks.get(self.main)
        sizes, errors = (None, None) if checked is None else (checked.sizes, checked.errors)
        draw(figure, self.main, self.watched[self.main], sizes, errors)


def _share(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{100 * value:.0f} %"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 110)


def _row(name: str, value: str) -> list[str]:
    return textwrap.wrap(value, 110, initial_indent=f"  {name:<15}", subsequent_indent=" " * 17)
