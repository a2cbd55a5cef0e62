"""From the lines of all runs to figures: of every arm at every rate, and of every arm against plain training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from newton_plugin_lightning._compare.lines import Line
from newton_plugin_lightning._compare.plan import Plan, rate_word
from newton_plugin_lightning._compare.statistics import Difference, Scores, difference, holm

__all__ = ["Against", "Results", "Row", "results_of"]


@dataclass(frozen=True)
class Row:
    """An arm at one learning rate.

    Attributes:
        arm, rate: which.
        rate_name: the learning rate itself, or the factor where there are several.
        mean, sd: of the metric over seeds; a failed run counts as the worst value of any run that did not fail.
        failed: how many runs did.
        chosen: whether the arm is judged at this rate.
        to_plain: the difference to plain training at the user's own rate, paired by seed; None for that itself. Its
            p-value and interval are not corrected for the number of rows.
    """

    arm: str
    rate: float
    rate_name: str
    mean: float
    sd: float
    failed: int
    chosen: bool
    to_plain: Difference | None


@dataclass(frozen=True)
class Against:
    """An arm against plain training, each at its best rate.

    Attributes:
        arm: which; ``ours`` and ``theirs`` are the chosen rows.
        difference: ours minus theirs in the metric's own direction, with the p-value of the exchange test.
        p_holm: corrected for the number of arms.
        better: whether the difference is in the direction that ``mode`` names.
    """

    arm: str
    ours: Row
    theirs: Row
    difference: Difference
    p_holm: float
    better: bool


@dataclass(frozen=True)
class Results:
    """All figures of a comparison.

    Attributes:
        plan: what was compared.
        rows: arms by rates, in the plan's order.
        against: all arms but plain.
        failures: for each arm the reasons of its failed runs, with their number.
        all_failed: no run finished, so no figure means anything.
    """

    plan: Plan
    rows: Sequence[Row]
    against: Sequence[Against]
    failures: Mapping[str, Mapping[str, int]]
    all_failed: bool

    def chosen(self, arm: str) -> Row:
        """The row at which an arm is judged."""
        return next(row for row in self.rows if row.arm == arm and row.chosen)

    def row(self, arm: str, rate: float) -> Row:
        """One row."""
        return next(row for row in self.rows if row.arm == arm and row.rate == rate)


def results_of(plan: Plan, lines: Mapping[tuple[int, str, float], Line]) -> Results:
    """The figures of finished runs, of all that the plan names."""
    sign = 1.0 if plan.mode == "max" else -1.0
    finite = [sign * line.value for line in lines.values() if line.value is not None]
    worst = min(finite, default=0.0)
    scores = {arm.name: _scores(plan, lines, arm.name, sign, worst) for arm in plan.arms}
    rows = [row for arm in plan.arms for row in _rows(plan, lines, arm.name, scores, sign)]
    chosen = {row.arm: row for row in rows if row.chosen}
    plain = plan.arms[0].name
    others = [arm.name for arm in plan.arms[1:]]
    found = [difference(scores[arm], scores[plain]) for arm in others]
    against = [
        Against(arm, chosen[arm], chosen[plain], _signed(one, sign), p, one.mean > 0)
        for arm, one, p in zip(others, found, holm([one.p for one in found]), strict=True)
    ]
    return Results(plan, rows, against, _failures(lines), not finite)


def _scores(plan: Plan, lines: Mapping[tuple[int, str, float], Line], arm: str, sign: float, worst: float) -> Scores:
    read = [[lines[seed, arm, rate].value for rate in plan.rates] for seed in plan.seeds]
    values = torch.tensor([[worst if v is None else sign * v for v in row] for row in read], dtype=torch.float64)
    return Scores(values, torch.tensor([[v is None for v in row] for row in read]))


def _rows(
    plan: Plan, lines: Mapping[tuple[int, str, float], Line], arm: str, scores: Mapping[str, Scores], sign: float
) -> list[Row]:
    ours, plain = scores[arm], scores[plan.arms[0].name]
    means, failed = ours.values.mean(0), ours.failed.sum(0)
    # the fewest failed runs, then the best mean, then the rate nearest to the user's own
    order = [(int(failed[r]), -float(means[r]), abs(math.log(rate))) for r, rate in enumerate(plan.rates)]
    best, own = order.index(min(order)), list(plan.rates).index(1)
    made = []
    for r, rate in enumerate(plan.rates):
        itself = arm == plan.arms[0].name and rate == 1
        gap = None if itself else _signed(difference(_column(ours, r), _column(plain, own)), sign)
        sd = float(ours.values[:, r].std())
        name = _rate_name(plan, lines, arm, rate)
        made.append(Row(arm, rate, name, sign * float(means[r]), sd, int(failed[r]), r == best, gap))
    return made


def _column(scores: Scores, r: int) -> Scores:
    return Scores(scores.values[:, r : r + 1], scores.failed[:, r : r + 1])


def _signed(one: Difference, sign: float) -> Difference:
    """In the metric's own direction."""
    if sign > 0:
        return one
    return Difference(0.0 - one.mean, 0.0 - one.high, 0.0 - one.low, one.p)


def _rate_name(plan: Plan, lines: Mapping[tuple[int, str, float], Line], arm: str, rate: float) -> str:
    named = {tuple(lines[seed, arm, rate].learning_rates) for seed in plan.seeds} - {()}
    if len(named) == 1 and len(one := next(iter(named))) == 1:
        return f"{one[0]:.3g}"
    return rate_word(rate)


def _failures(lines: Mapping[tuple[int, str, float], Line]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for line in lines.values():
        if line.failed is not None:
            reasons = found.setdefault(line.arm, {})
            reasons[line.failed] = reasons.get(line.failed, 0) + 1
    return found
