"""The table of the search for a rule: every arm and candidate that was tried, on every problem."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.tables.markdown import lines
from benchmarks.evidence.tables.paired import Comparison, compare, holm
from benchmarks.evidence.training.arms import ARMS, BASELINE, CANDIDATES
from benchmarks.evidence.training.plan import PANEL, Done, final

__all__ = ["best_by_arm", "search_table"]

Scores = dict[int, float]


def best_by_arm(done: Done, problem: str) -> dict[str, tuple[float, Scores]]:
    """For each arm the learning rate with the best mean over its seeds, and the final scores by seed there.

    Only rates that have been run on as many seeds as any of the arm's are compared.
    """
    found: dict[str, dict[float, Scores]] = {}
    for run, row in done.items():
        if run.problem == problem and run.purpose == "search":
            found.setdefault(run.arm, {}).setdefault(run.learning_rate, {})[run.seed] = final(row)
    best = {}
    for arm, rates in found.items():
        most = max(map(len, rates.values()))
        whole = {rate: scores for rate, scores in rates.items() if len(scores) == most}
        rate = max(whole, key=lambda r: statistics.mean(whole[r].values()))
        best[arm] = rate, whole[rate]
    return best


def _compare(best: dict[str, tuple[float, Scores]], arm: str, seeds: set[int]) -> Comparison | None:
    """An arm against the baseline on some seeds; None without two of them in both."""
    if arm not in best or BASELINE not in best:
        return None
    ours, theirs = best[arm][1], best[BASELINE][1]
    both = sorted(ours.keys() & theirs.keys() & seeds)
    return compare([ours[s] for s in both], [theirs[s] for s in both]) if len(both) > 1 else None


def search_table(done: Done, every: Mapping[str, Problem]) -> str:
    """Screening (four seeds) and choice (eight), as Markdown."""
    names = [name for name in PANEL if any(run.problem == name for run in done)]
    arms = [arm for arm in (*ARMS, *CANDIDATES) if any(run.arm == arm for run in done)]
    best = {name: best_by_arm(done, name) for name in names}
    eight = {s for run in done if run.purpose == "search" for s in [run.seed]}
    chosen = [a for a in arms if sum(a in best[n] and len(best[n][a][1]) == len(eight) for n in names) > len(names) / 2]
    parts = [
        "# Search for a rule",
        "Made by `python -m benchmarks.evidence tables` from evidence/search.jsonl, by [the protocol](../PROTOCOL.md): "
        "validation data, search seeds, every arm at its best of three learning rates. Candidates are defined in "
        "benchmarks/evidence/rules/of_*.py. No test data, and no claim: the report's tables decide.",
        f"{len(done)} runs, {sum(not row['finite'] for row in done.values())} left the finite numbers, "
        f"{sum(row['kept'] > 0 for row in done.values())} had a batch whose step was not finite and that kept its "
        f"gradient. {_versions(done)}",
        "## Problems",
        "\n".join(f"* **{n}**: {every[n].title}; {_detail(done, n)}" for n in names),
        "## What plain, stable reaches, and the difference to it",
        "Points; all seeds that an arm was run on. * p < .05, ** p < .05 after Holm over the panel (exact sign flips; "
        "four seeds cannot reach either). The last columns: mean over the problems; problems with more than two "
        "points more, and less, than plain.",
        _differences(names, arms, best, eight),
    ]
    if len(eight) > 4 and chosen:
        parts += ["## With intervals, on all seeds", _intervals(names, chosen, best, eight)]
    parts += ["## Learning rates that were best", _rates(names, arms, best)]
    return "\n\n".join(parts) + "\n"


def _detail(done: Done, name: str) -> str:
    run = next(run for run in done if run.problem == name)
    sharp = "" if run.sharpness is None else f"sharpness {run.sharpness:g}, "
    return f"{sharp}{run.steps} steps of {run.batch}"


def _versions(done: Done) -> str:
    return "; ".join(
        sorted({f"newton_plugin {r['newton_plugin']} ({r['commit']}), torch {r['torch']}" for r in done.values()})
    )


def _differences(names: list[str], arms: list[str], best: Mapping[str, dict], seeds: set[int]) -> str:
    rows = []
    for arm in arms:
        if arm == BASELINE:
            cells = [f"{statistics.mean(best[n][arm][1].values()):.1f}" if arm in best[n] else "" for n in names]
            rows.append([f"{arm} (per cent)", *cells, "", "", ""])
            continue
        compared = {n: c for n in names if (c := _compare(best[n], arm, seeds)) is not None}
        corrected = dict(zip(compared, holm([c.p for c in compared.values()]), strict=True))
        cells = []
        for n in names:
            c = compared.get(n)
            mark = "" if c is None else "**" if corrected[n] < 0.05 else "*" if c.p < 0.05 else ""
            cells.append("" if c is None else f"{c.mean:+.1f}{mark}")
        means = [c.mean for c in compared.values()]
        summary = [f"{statistics.mean(means):+.1f}"] if means else [""]
        rows.append([arm, *cells, *summary, str(sum(m > 2 for m in means)), str(sum(m < -2 for m in means))])
    return lines(["arm", *names, "mean", "> 2", "< -2"], rows)


def _intervals(names: list[str], arms: list[str], best: Mapping[str, dict], seeds: set[int]) -> str:
    rows = []
    for arm in arms:
        if arm == BASELINE:
            continue
        for n in names:
            c = _compare(best[n], arm, seeds)
            if c is not None and c.pairs == len(seeds):
                interval = f"{c.mean:+.1f} [{c.low:+.1f}, {c.high:+.1f}]"
                rows.append([arm, n, interval, f"{c.p:.3f}", f"{c.wilcoxon:.3f}"])
    return lines(["arm", "problem", "difference [95 %]", "sign-flip p", "Wilcoxon p"], rows)


def _rates(names: list[str], arms: list[str], best: Mapping[str, dict]) -> str:
    rows = [[arm, *(f"{best[n][arm][0]:g}" if arm in best[n] else "" for n in names)] for arm in arms]
    return lines(["arm", *names], rows)
