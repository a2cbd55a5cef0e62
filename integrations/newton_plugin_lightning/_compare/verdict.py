"""One sentence: what the figures say about every arm, under which tuning budget, and no more."""

from __future__ import annotations

import math
from collections.abc import Sequence

from newton_plugin_lightning._compare.results import Against, Results, Row
from newton_plugin_lightning._compare.statistics import LEVEL, Difference, seeds_needed, smallest_p

__all__ = ["digits_of", "interval", "verdict"]

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def verdict(results: Results) -> str:
    """The sentence, without the word in front of it."""
    if results.all_failed:
        return "nothing can be said, because every run failed."
    budget, against = _budget(results), results.against
    seeds, comparisons = len(results.plan.seeds), len(against)
    found = [a for a in against if a.p_holm <= LEVEL]
    parts = [_finding(a, results) for a in found]
    if smallest_p(seeds, comparisons) > LEVEL:
        parts.append(
            f"no difference can be shown (the smallest p of {_count(comparisons, 'comparison')} with so few is "
            f"{smallest_p(seeds, comparisons):.3g}; {seeds_needed(comparisons)} seeds can show one): "
            f"{_differences(against, results)}, which is no finding yet"
        )
    elif len(found) < comparisons:
        rest = [a for a in against if a not in found]
        parts.append(f"no difference from plain is found for {_differences(rest, results)}")
    parts += _advice(results, found)
    return f"{budget}, {'; '.join(parts)}."


def _finding(one: Against, results: Results) -> str:
    ahead = "ahead of" if one.better else "behind"
    size = _number(abs(one.difference.mean), results)
    return (
        f"{one.arm} (at {one.ours.rate_name}) is {ahead} plain (at {one.theirs.rate_name}) by {size} "
        f"{interval(one.difference, digits_of(results))}, p = {one.p_holm:.2g}{_failed_too(one.ours, one.theirs)}"
    )


def _failed_too(ours: Row, theirs: Row) -> str:
    told = [f"{row.failed} runs of {row.arm}" for row in (ours, theirs) if row.failed]
    return f", with {' and '.join(told)} that failed" if told else ""


def _differences(those: Sequence[Against], results: Results) -> str:
    digits = digits_of(results)
    return ", ".join(
        f"{a.arm} {a.difference.mean:+.{digits}f} {interval(a.difference, digits)}{_failed_too(a.ours, a.theirs)}"
        for a in those
    )


def _advice(results: Results, found: Sequence[Against]) -> list[str]:
    """What plain training may still have in store: a better rate among those tried, or beyond them."""
    plan, advice = results.plan, []
    plain = results.chosen(plan.arms[0].name)
    own = results.row(plain.arm, 1.0)
    if plain.rate != 1:
        tail = "" if any(a.better for a in found) else ": try that first"
        advice.append(
            f"plain's own mean is {_number(plain.mean, results)} at {plain.rate_name} and "
            f"{_number(own.mean, results)} at your {own.rate_name}{tail}"
        )
    judged = [plain, *(a.ours for a in found)]
    ends = [row for row in judged if row.rate in (plan.rates[0], plan.rates[-1])] if len(plan.rates) > 1 else []
    for row in ends:
        which, more = ("largest", "larger") if row.rate == plan.rates[-1] else ("smallest", "smaller")
        advice.append(f"the best rate of {row.arm} is the {which} tried, so {more} ones may be better")
    return advice


def _budget(results: Results) -> str:
    plan, own = results.plan, results.row(results.plan.arms[0].name, 1.0)
    if len(plan.rates) == 1:
        return f"At your learning rate alone ({own.rate_name}, tuned for no arm) and {len(plan.seeds)} seeds"
    tried = ", ".join(results.row(own.arm, rate).rate_name for rate in plan.rates)
    number = _NUMBERS[len(plan.rates)] if len(plan.rates) < len(_NUMBERS) else str(len(plan.rates))
    return f"With the same {number} learning rates tried for every arm ({tried}) on {len(plan.seeds)} seeds"


def interval(one: Difference, digits: int) -> str:
    """[low, high], or words where it has no ends."""
    if math.isinf(one.low):
        return "[no bounds]"
    return f"[{one.low:.{digits}f}, {one.high:.{digits}f}]"


def digits_of(results: Results) -> int:
    """Digits behind the point that show two figures of the spread between seeds."""
    spread = max((row.sd for row in results.rows), default=0.0)
    return 4 if spread <= 0 else min(8, max(0, 1 - math.floor(math.log10(spread))))


def _number(value: float, results: Results) -> str:
    return f"{value:.{digits_of(results)}f}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
