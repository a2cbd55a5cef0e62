"""What to take, and why: the findings of docs/when-it-helps.md and docs/gated.md as a list of rules, the first decides.

Every threshold stands between problems of those pages, named beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["Advice", "Evidence", "advise"]

FEW_SAMPLES = 8  # batches of 4 gained nothing by the default and lost by every other rule; of 32 they gained
WIDE_SPREAD = 6.0  # paths: 6.7 to 12.4; rankings: 1.1 to 2.1; classes: 1.3 to 4.6
HEAVY_TAIL = 0.5  # ten digits and a very sharp sort, halfway: .8 to .9; two-digit numbers: .3
GROWN = 0.15
EVEN_TAIL = 0.2  # below, a batch has no tail to speak of: a tenth of equal samples holds .1
OPEN_GATE = 0.5  # wrong lists 1, wrong labels .7 to .9; clean classes and paths: below .1

Take = Literal["default", "gated", "plain", "mend"]
_SETTINGS = {
    "default": "the default, LossHook() or NewtonLosses()",
    "gated": 'structure="gated"',
    "plain": "plain training, without the package",
}


@dataclass(frozen=True)
class Advice:
    """What to take.

    Attributes:
        take: "default"; "gated", ``structure="gated"``; "plain", training without the package; "mend", the loss first.
        because: the reason, a sentence or two.
    """

    take: Take
    because: str

    @property
    def headline(self) -> str:
        """The fault of the loss, in front of a report."""
        return f"{self.because[0].upper()}{self.because[1:]}: mend that first."

    def __str__(self) -> str:
        if self.take == "mend":
            return f"Recommended: {self.headline[0].lower()}{self.headline[1:]}"
        return f"Recommended: {_SETTINGS[self.take]}, because {self.because}."


@dataclass(frozen=True)
class Evidence:
    """What is known; NaN, "" or False where it is not.

    Attributes:
        fault: what is wrong with the loss itself, in words.
        random: whether the loss draws random numbers.
        samples: N.
        tail, spread: see docs/when-it-helps.md.
        tail_before: the tail of earlier steps.
        gate, contradiction: see docs/gated.md.
        memoryless: whether the optimizer remembers no gradients, as SGD without adaptive sizes.
    """

    fault: str = ""
    random: bool = False
    samples: int = 0
    tail: float = math.nan
    spread: float = math.nan
    tail_before: float = math.nan
    gate: float = math.nan
    contradiction: float = math.nan
    memoryless: bool = False


def advise(evidence: Evidence) -> Advice:
    """The first rule that applies."""
    return next(_rules(evidence))


def _rules(e: Evidence) -> Iterator[Advice]:
    if e.fault:
        yield Advice("mend", e.fault)
    if e.samples < FEW_SAMPLES:
        yield Advice(
            "plain",
            f"a batch of {e.samples} samples has too few for their weights to mean something: with four, nothing was "
            "gained",
        )
    contradicted = e.gate >= OPEN_GATE and not e.tail < EVEN_TAIL
    if contradicted and (e.memoryless or e.spread >= WIDE_SPREAD):
        yield Advice("gated", f"{_contradiction(e)}, and this rule weighs it down without longer steps")
    if contradicted:
        yield Advice("default", f"{_contradiction(e)}, and it weighs the tail down")
    if e.memoryless:
        yield Advice(
            "gated",
            "with SGD it keeps the length of the gradient. At plain training's own learning rate the default lost 48 "
            "to 87 points on four of five classifiers with SGD",
        )
    if e.random:
        yield Advice(
            "plain",
            "the loss draws random numbers: a sample's gradient is then noise in part, also in its length, and no rule "
            "that weighs by it gained anything there",
        )
    if e.spread >= WIDE_SPREAD:
        yield Advice(
            "plain",
            f"directions differ much (spread {e.spread:.1f}), as in losses for shortest paths. The default lost 2.3 "
            "and 5.8 points on two of four of them, a matrix more",
        )
    if e.tail >= HEAVY_TAIL or e.tail - e.tail_before >= GROWN:
        grown = f", up from {_percent(e.tail_before)}" if e.tail - e.tail_before >= GROWN else ""
        yield Advice(
            "default",
            f"few samples decide the batch: a tenth of them holds {_percent(e.tail)} of its squared gradients{grown}. "
            "There it gained most: 4 to 16 points on long and on very sharp rankings",
        )
    yield Advice(
        "default",
        "no Hessian and no matrix did better in the report, and Hessians did harm. Expect little where plain training "
        "works: on classifiers and two-digit numbers it was level. It gains on long or sharp rankings, ranking metrics "
        "and wrong data",
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _contradiction(e: Evidence) -> str:
    return f"the tail of the batch contradicts its body (by {e.contradiction:.2f}), as wrong data do"
