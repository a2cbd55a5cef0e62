"""The page with the tables, made from the lines alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.evidence.tables.markdown import lines
from benchmarks.evidence.tables.paired import Comparison, compare
from benchmarks.evidence.training.runs import Purpose
from benchmarks.suspects.runs import FOLDED, SEEDS, TRAININGS, Done, best_rate, runs_of
from benchmarks.suspects.scores import FAMILIES, OURS, family
from benchmarks.suspects.tasks import DOSES, TASKS, Task

__all__ = ["LEVEL", "Row", "chosen", "report", "rows", "verdict"]

LEVEL = 0.05
USUAL = ("loss: all epochs", "loss: last")
"""Peers that are shown whatever the family of the loss chooses."""


@dataclass(frozen=True)
class Row:
    """One dose of one task under one training.

    Attributes:
        areas: AUROC by score and purpose, one for each seed.
    """

    task: Task
    dose: int
    training: str
    areas: dict[tuple[str, Purpose], list[float]]

    def mean(self, score: str, purpose: Purpose) -> float:
        """NaN where the score was not taken."""
        return statistics.mean(self.areas.get((score, purpose), [math.nan]))

    def peers(self, among: Sequence[str]) -> list[str]:
        """Those that were taken here."""
        return [score for score in among if family(score) != OURS and (score, "report") in self.areas]

    def best_peer(self, among: Sequence[str]) -> str:
        """By validation seeds."""
        return max(self.peers(among), key=lambda score: self.mean(score, "tune"))

    def difference(self, ours: str, peer: str) -> Comparison:
        """Ours less the peer's, seed by seed."""
        return compare(self.areas[ours, "report"], self.areas[peer, "report"])


def rows(done: Done) -> list[Row]:
    """All rows whose runs have their lines; a task that was not finished has none."""
    found: list[Row] = []
    for task in TASKS.values():
        try:
            rate = best_rate(task, done)
        except LookupError:
            continue
        for training in TRAININGS:
            wanted = {p: runs_of(task, training, [rate], p) for p in SEEDS}
            if not all(run in done for runs in wanted.values() for run in runs):
                continue
            found += [Row(task, dose, training, _areas(task, dose, training, rate, done)) for dose in DOSES]
    return found


def _areas(task: Task, dose: int, training: str, rate: float, done: Done) -> dict[tuple[str, Purpose], list[float]]:
    """Of one row; those of the folds do not depend on the training, and are in the rows of both."""
    areas: dict[tuple[str, Purpose], list[float]] = {}
    for purpose in SEEDS:
        for arm in (training, FOLDED):
            runs = [r for r in runs_of(task, arm, [rate], purpose) if r.problem == f"{task.name}_{dose:02d}"]
            if not all(run in done for run in runs):
                continue
            for score in done[runs[0]]["auroc"]:
                areas[score, purpose] = [done[run]["auroc"][score] for run in runs]
    return areas


def chosen(found: Sequence[Row]) -> dict[str, str]:
    """The variant of each family with the best mean over the rows that have it, validation seeds."""
    best: dict[str, str] = {}
    for name in FAMILIES:
        taken = [row for row in found if any(family(score) == name for score, _ in row.areas)]
        scores = dict.fromkeys(score for row in taken for score, p in row.areas if family(score) == name)
        if scores:
            best[name] = max(scores, key=lambda s: statistics.mean(row.mean(s, "tune") for row in taken))
    return best


def _spread(values: Sequence[float]) -> str:
    """Mean and standard error."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def _counts(found: Sequence[Row], ours: str, peers: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Rows in which ours is better, worse, and neither, for each peer."""
    counts: dict[str, tuple[int, int, int]] = {}
    for peer in peers:
        taken = [row.difference(ours, peer) for row in found if row.peers([peer])]
        better = sum(c.p < LEVEL and c.mean > 0 for c in taken)
        worse = sum(c.p < LEVEL and c.mean < 0 for c in taken)
        counts[peer] = better, worse, len(taken) - better - worse
    return counts


def verdict(counts: dict[str, tuple[int, int, int]]) -> str:
    """It ships if it is significantly better in more rows than it is worse, against every peer."""
    lost = [peer for peer, (better, worse, _) in counts.items() if better <= worse]
    if not lost:
        return "The contradiction **ships** as a score of suspects: better in more rows than worse, against every peer."
    against = "; ".join(f"*{peer}* (better in {counts[peer][0]} rows, worse in {counts[peer][1]})" for peer in lost)
    return (
        "The contradiction **does not ship** as a score of suspects. It is not significantly better in more rows than "
        f"it is worse against {against}."
    )


def report(done: Done) -> str:
    """Markdown."""
    found = rows(done)
    if not found:
        return "No task has all its runs yet.\n"
    best = chosen(found)
    ours = best[OURS]
    peers = [*dict.fromkeys([*(score for name, score in best.items() if name != OURS), *USUAL])]
    versions = sorted(
        {f"newton_plugin {r['newton_plugin']} ({r['commit']}), torch {r['torch']}" for r in done.values()}
    )
    seeds = SEEDS["report"]
    parts = [
        "# Suspects: does the contradiction find wrong data?",
        "Made by `python -m benchmarks.suspects` from suspects.jsonl; what is measured, and what was fixed before, "
        f"stands in `benchmarks/suspects/__init__.py`. {len(done)} runs. {'; '.join(versions)}.",
        _choices(found, best, done),
        f"## AUROC on seeds {seeds[0]} to {seeds[-1]}: mean ± standard error",
        "0.5: chance. 1: every wrong sample above every right one. Bold: the largest mean of a row.",
        *(f"### {training} training\n\n{_table(found, training, ours, peers)}" for training in TRAININGS),
        "## The contradiction against the best peer of each row",
        "The peer is the one with the best mean on the validation seeds. Difference in AUROC, paired by seed, with its "
        "95 % bootstrap interval and the p of exact sign flips (not corrected; the smallest that eight seeds can give "
        f"is .008); bold where p < {LEVEL:g}.",
        _differences(found, ours, peers),
        "## The contradiction against every peer",
        _tally(counts := _counts(found, ours, peers)),
        "## Verdict",
        verdict(counts),
    ]
    return "\n\n".join(parts) + "\n"


def _choices(found: Sequence[Row], best: dict[str, str], done: Done) -> str:
    tasks = dict.fromkeys(row.task.name for row in found)
    rates = ", ".join(f"{TASKS[name].title}: {best_rate(TASKS[name], done):g}" for name in tasks)
    text = f"Chosen on the validation seeds: {'; '.join(f'*{score}*' for score in best.values())}. Rates: {rates}."
    left = [name for name in FAMILIES if name not in best]
    return text + (f" **Left out, with no line: {', '.join(left)}.**" if left else "")


def _table(found: Sequence[Row], training: str, ours: str, peers: Sequence[str]) -> str:
    shown: list[list[str]] = []
    scores = [ours, *peers]
    for row in found:
        if row.training != training:
            continue
        areas = {s: row.areas[s, "report"] for s in scores if (s, "report") in row.areas}
        top = max(areas, key=lambda s: statistics.mean(areas[s]))
        cells = [("**{}**" if s == top else "{}").format(_spread(areas[s])) if s in areas else "" for s in scores]
        shown.append([row.task.title, f"{row.dose} %", *cells])
    return lines(["task", "wrong", *scores], shown)


def _differences(found: Sequence[Row], ours: str, peers: Sequence[str]) -> str:
    shown: list[list[str]] = []
    for row in found:
        peer = row.best_peer(peers)
        c = row.difference(ours, peer)
        text = f"{c.mean:+.3f} [{c.low:+.3f}, {c.high:+.3f}]"
        marked = f"**{text}**" if c.p < LEVEL else text
        shown.append([row.task.title, f"{row.dose} %", row.training, peer, marked, f"{c.p:.3f}"])
    return lines(["task", "wrong", "training", "best peer", "difference", "p"], shown)


def _tally(counts: dict[str, tuple[int, int, int]]) -> str:
    header = ["peer", "rows in which the contradiction is better", "worse", f"neither (p >= {LEVEL:g})"]
    return lines(header, [[peer, *map(str, three)] for peer, three in counts.items()])
