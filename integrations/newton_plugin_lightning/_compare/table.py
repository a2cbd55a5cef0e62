"""The report in Markdown: every arm against plain training, every arm at every rate, the notes, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from newton_plugin_lightning._compare.results import Against, Results, Row
from newton_plugin_lightning._compare.verdict import digits_of, interval, verdict

__all__ = ["report"]


def report(results: Results, notes: Sequence[str] = ()) -> str:
    """The whole page; ``notes`` are about the runs (what was taken out, warnings)."""
    plan = results.plan
    better = "larger" if plan.mode == "max" else "smaller"
    sections = [
        f"# {plan.metric} at the end of training ({better} is better), {len(plan.seeds)} seeds",
        "Each arm at its best rate, against plain training at its own best rate:",
        _against(results),
        "Each arm at each rate; a star marks the best. Differences are to plain training at your own rate, paired by "
        "seed; their intervals are not corrected for the choice of a row:",
        _rows(results),
        "\n".join(f"* {note}" for note in [*_about(results), *notes]),
        f"Verdict: {verdict(results)}",
    ]
    return "\n\n".join(sections) + "\n"


def _against(results: Results) -> str:
    head = "| arm | its rate | mean (sd) | plain's rate | mean (sd) | difference [95 %] | p | p, Holm |"
    return "\n".join([head, "|---" * 8 + "|", *(_one_against(a, digits_of(results)) for a in results.against)])


def _one_against(one: Against, digits: int) -> str:
    cells = [
        one.arm,
        one.ours.rate_name,
        _mean(one.ours, digits),
        one.theirs.rate_name,
        _mean(one.theirs, digits),
        f"{one.difference.mean:+.{digits}f} {interval(one.difference, digits)}",
        f"{one.difference.p:.3g}",
        f"{one.p_holm:.3g}",
    ]
    return f"| {' | '.join(cells)} |"


def _rows(results: Results) -> str:
    digits, seeds = digits_of(results), len(results.plan.seeds)
    lines = ["| arm | learning rate | mean (sd) | failed | difference [95 %] |", "|---" * 5 + "|"]
    for row in results.rows:
        gap = "" if row.to_plain is None else f"{row.to_plain.mean:+.{digits}f} {interval(row.to_plain, digits)}"
        star = " *" if row.chosen else ""
        failed = f"{row.failed} of {seeds}" if row.failed else "0"
        lines.append(f"| {row.arm} | {row.rate_name}{star} | {_mean(row, digits)} | {failed} | {gap} |")
    return "\n".join(lines)


def _mean(row: Row, digits: int) -> str:
    return f"{row.mean:.{digits}f} ({row.sd:.{digits}f})"


def _about(results: Results) -> list[str]:
    seeds = ", ".join(map(str, results.plan.seeds))
    told = [
        f"Seeds {seeds}: with the same seed all arms begin with the same weights and see the same data.",
        "p: the share of all exchanges of seeds between two arms, the choice of both rates made anew in each, that lie "
        "as far out; Holm corrects it for the number of arms, the intervals are for one arm.",
    ]
    if any(row.failed for row in results.rows):
        told.append("A failed run counts as the worst value of any run that did not fail.")
    for arm, reasons in results.failures.items():
        told += [f"{arm} failed {number} times: {reason}" for reason, number in sorted(reasons.items())]
    return told
