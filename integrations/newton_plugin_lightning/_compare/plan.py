"""Which runs a comparison consists of, in their order: by seed, so that what is there at any time is paired."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from newton_plugin import ArgumentError
from newton_plugin_lightning._compare.arms import Arm

__all__ = ["Plan", "Run", "check_plan", "rate_word"]


@dataclass(frozen=True)
class Run:
    """One training: a seed, an arm, and what its learning rate is multiplied by."""

    seed: int
    arm: Arm
    rate: float

    @property
    def key(self) -> tuple[int, str, float]:
        """What identifies the run in the file."""
        return self.seed, self.arm.name, self.rate

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.arm.name}, {rate_word(self.rate)}"


@dataclass(frozen=True)
class Plan:
    """All runs, and how their metric is read.

    Attributes:
        metric: as the module logs it.
        mode: "max" where larger is better.
        seeds, arms, rates: every combination is a run; ``arms[0]`` is plain training.
    """

    metric: str
    mode: Literal["max", "min"]
    seeds: Sequence[int]
    arms: Sequence[Arm]
    rates: Sequence[float]

    def runs(self) -> list[Run]:
        """Every run; the first is plain training at the user's rate, which shows a fault at once."""
        rates = sorted(self.rates, key=lambda rate: (rate != 1, rate))
        return [Run(seed, arm, rate) for seed in self.seeds for arm in self.arms for rate in rates]


def check_plan(metric: Any, mode: Any, seeds: Any, arms: Sequence[Arm], rates: Any) -> Plan:
    """The plan of these arguments, with ``seeds`` a number of seeds or the seeds themselves.

    Raises:
        ArgumentError: a value outside its rule.
    """
    if not isinstance(metric, str) or not metric:
        raise ArgumentError(f"metric must be a name that the module logs; got {metric!r}.")
    if mode not in ("max", "min"):
        raise ArgumentError(f"mode must be 'max' or 'min': which of two figures is better; got {mode!r}.")
    listed = [] if isinstance(seeds, bool) else list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if len(listed) < 2 or len(set(listed)) < len(listed) or not all(isinstance(s, int) and s >= 0 for s in listed):
        raise ArgumentError(
            f"seeds must be how many, at least 2, or a list of different seeds, none below 0; got {seeds!r}."
        )
    if len(arms) < 2:
        raise ArgumentError("arms must name something beside plain training. Add 'default'.")
    rates = [float(rate) for rate in rates]
    right = all(math.isfinite(rate) and rate > 0 for rate in rates)
    if 1 not in rates or not right or len(set(rates)) < len(rates):
        raise ArgumentError(
            f"rates must be different positive factors of your learning rate, 1 among them; got {rates}."
        )
    return Plan(metric, mode, listed, list(arms), sorted(rates))


def rate_word(rate: float) -> str:
    """A factor as a person writes it.

    >>> rate_word(1 / 3), rate_word(1.0), rate_word(0.25)
    ('x1/3', 'x1', 'x1/4')
    """
    near = Fraction(rate).limit_denominator(10)
    return f"x{near}" if abs(float(near) - rate) < 1e-9 * rate else f"x{rate:.4g}"
