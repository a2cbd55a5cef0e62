"""A table of the report: test data, report seeds, every arm with the configuration that tuning chose for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.evidence.bilevel_lists import BilevelLists
from benchmarks.evidence.live.problems import LiveProblem
from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.tables.markdown import difference, lines, number, spread
from benchmarks.evidence.tables.paired import Comparison, compare, holm
from benchmarks.evidence.training.arms import ARMS, BASELINE, COMPOSED, arms_of, configurations, shown
from benchmarks.evidence.training.plan import Done, best_run
from benchmarks.evidence.training.runs import REPORT_SEEDS, Run

__all__ = ["OUTCOMES", "final_comparisons", "report_table"]

Row = Mapping[str, Any]


def _final(row: Row) -> float:
    return row["curve"][-1][2]


def _best(row: Row) -> float:
    """Test score where validation was best, the first such checkpoint."""
    return max(row["curve"], key=lambda point: point[1])[2]


def _early(row: Row) -> float:
    return row["curve"][1][2]  # the second of ten checkpoints


OUTCOMES: dict[str, Callable[[Row], float]] = {"final": _final, "best on validation": _best, "a fifth": _early}
"""What is read off a curve of [step, validation, test]."""


class _Table:
    """The lines of one table: for each problem and arm the chosen run and its rows by seed."""

    def __init__(self, table: str, done: Done, every: Mapping[str, Problem]) -> None:
        self.table, self.every = table, every
        self.names = [name for name, problem in every.items() if problem.table == table]
        self.cells: dict[tuple[str, str], dict[int, Row]] = {}
        self.run: dict[tuple[str, str], Run] = {}
        table_lines = {run: row for run, row in done.items() if run.problem in self.names}
        overtaken = _overtaken(table_lines, every)
        for run, row in table_lines.items():
            configuration = (run.problem, run.arm, run.learning_rate, run.second)
            if run.purpose == "report" and configuration not in overtaken:
                self.cells.setdefault((run.problem, run.arm), {})[run.seed] = row
                self.run[run.problem, run.arm] = run
        self.names = [name for name in self.names if (name, BASELINE) in self.cells]
        for arm, sources in COMPOSED.items():
            for name in self.names:
                source = name, sources[every[name].optimizer]
                if source in self.cells:
                    self.cells[name, arm], self.run[name, arm] = self.cells[source], self.run[source]

    def arms(self, name: str) -> list[str]:
        return [arm for arm in (*ARMS, *COMPOSED) if (name, arm) in self.cells]

    def values(self, name: str, arm: str, outcome: str) -> dict[int, float]:
        read = OUTCOMES[outcome]
        return {s: read(row) if row["finite"] else 0.0 for s, row in sorted(self.cells[name, arm].items())}

    def comparisons(self, outcome: str) -> dict[tuple[str, str], tuple[Comparison, float]]:
        """Every arm against the baseline, with Holm's p over all of them; rows of a composed arm count once."""
        found: dict[tuple[str, str], Comparison] = {}
        for name in self.names:
            base = self.values(name, BASELINE, outcome)
            for arm in self.arms(name):
                ours = self.values(name, arm, outcome)
                both = sorted(ours.keys() & base.keys())
                if arm not in (BASELINE, *COMPOSED) and len(both) > 1:
                    found[name, arm] = compare([ours[s] for s in both], [base[s] for s in both])
        corrected = holm([c.p for c in found.values()])
        done = {key: (c, p) for (key, c), p in zip(found.items(), corrected, strict=True)}
        same = (
            (name, arm, (name, self.run[name, arm].arm))
            for name in self.names
            for arm in COMPOSED
            if (name, arm) in self.run
        )
        return done | {(name, arm): done[source] for name, arm, source in same if source in done}

    def unfinished(self) -> list[str]:
        """What is missing before the table is what the protocol says."""
        problems = [name for name, problem in self.every.items() if problem.table == self.table]
        arms = arms_of(arm for _, arm in self.cells)
        wanted = [(name, arm) for name in problems for arm in arms if arm not in self.every[name].without]
        absent = [key for key in wanted if key not in self.cells]
        seeds = sorted({len(cell) for cell in self.cells.values()})
        found = [f"{len(absent)} of {len(wanted)} trainings of an arm on a problem have not been run"] * bool(absent)
        few = seeds != [len(REPORT_SEEDS)]
        return found + [f"arms have {seeds} of {len(REPORT_SEEDS)} seeds"] * few

    def at_edge(self, name: str, arm: str) -> bool:
        """Whether a chosen number is the first or last of its grid."""
        run = self.run[name, arm]
        grid = _grid(self.every[name], run.arm, run.data)
        rates = sorted({rate for rate, _ in grid})
        seconds = sorted({second for _, second in grid if second is not None})
        return run.learning_rate in (rates[0], rates[-1]) or run.second in (*seconds[:1], *seconds[-1:])


def _grid(problem: Problem, arm: str, data: str) -> list[tuple[float, float | None]]:
    if isinstance(problem, BilevelLists):
        return problem.grid
    if isinstance(problem, LiveProblem):
        return problem.configurations(arm)
    return configurations(ARMS[arm], problem.optimizer, data)


def _overtaken(done: Done, every: Mapping[str, Problem]) -> set[tuple]:
    """(problem, arm, rate, second) that were reported, and then a grid had become larger and tuning chose another."""
    tuned: dict[tuple[str, str], list[Run]] = {}
    reported = {}
    for run in done:
        if run.purpose == "report":
            reported[run.problem, run.arm, run.learning_rate, run.second] = run
        elif run.purpose == "tune":
            tuned.setdefault((run.problem, run.arm), []).append(run)
    found = set()
    for (name, arm, *configuration), run in reported.items():
        grid = _grid(every[name], arm, run.data)
        runs = [
            other
            for other in tuned.get((name, arm), [])
            if other.sharpness == run.sharpness and (other.learning_rate, other.second) in grid
        ]
        if runs:  # nobody tunes in a test
            best = best_run(runs, done)
            if [best.learning_rate, best.second] != configuration:
                found.add((name, arm, *configuration))
    return found


def final_comparisons(
    table: str, done: Done, every: Mapping[str, Problem]
) -> dict[tuple[str, str], tuple[Comparison, float]]:
    """(problem, arm) to its comparison with the baseline at the end, and Holm's p over the table."""
    return _Table(table, done, every).comparisons("final")


def report_table(table: str, done: Done, every: Mapping[str, Problem], source: str = "") -> str:
    """Markdown: an overview of differences for each outcome, then every problem in full.

    Args:
        table, done, every: the group of problems, all lines, all problems.
        source: the file of the lines, and what is said of it; empty: that of the table.
    """
    t = _Table(table, done, every)
    rows = [row for cell in t.cells.values() for row in cell.values()]
    versions = sorted({f"newton_plugin {r['newton_plugin']} ({r['commit']}), torch {r['torch']}" for r in rows})
    whole = " **Unfinished: " + "; ".join(t.unfinished()) + ".**" if t.unfinished() else ""
    images = sorted({run.data for run in t.run.values()} - {"digits"})
    longer = sorted({run.steps for run in t.run.values()} - {every[run.problem].steps for run in t.run.values()})
    parts = [
        f"# Evidence: {table}"
        + "".join(f", images of {name}" for name in images)
        + "".join(f", {k} steps" for k in longer),
        f"Made by `python -m benchmarks.evidence tables` from {source or f'evidence/{table}.jsonl'}, by "
        "[the protocol](../PROTOCOL.md). Test data, per cent; differences to plain, stable, paired by seed, with "
        "bootstrap 95 % intervals; bold: p < .05 after Holm over all comparisons of the outcome (exact sign flips)."
        f"{whole} {'; '.join(versions)}.",
    ]
    for outcome in OUTCOMES:
        title = {"final": "At the end", "best on validation": "Best checkpoint on validation", "a fifth": "At a fifth"}
        parts += [f"## {title[outcome]}", _overview(t, outcome)]
    parts += ["## In full, at the end"]
    compared = t.comparisons("final")
    for name in t.names:
        parts += [f"### {every[name].title}", _detail(t, name, compared)]
    return "\n\n".join(parts) + "\n"


def _overview(t: _Table, outcome: str) -> str:
    compared = t.comparisons(outcome)
    arms = [arm for arm in (*ARMS, *COMPOSED) if arm != BASELINE and any(arm in t.arms(name) for name in t.names)]
    rows = []
    for name in t.names:
        base = spread(list(t.values(name, BASELINE, outcome).values()))
        cells = [difference(*compared[name, arm]) if (name, arm) in compared else "" for arm in arms]
        rows.append([t.every[name].title, base, *cells])
    better = [sum(c.mean > 0 and p < 0.05 for (_, a), (c, p) in compared.items() if a == arm) for arm in arms]
    worse = [sum(c.mean < 0 and p < 0.05 for (_, a), (c, p) in compared.items() if a == arm) for arm in arms]
    rows.append(["significantly better / worse", "", *(f"{b} / {w}" for b, w in zip(better, worse, strict=True))])
    return lines(["problem", BASELINE, *map(shown, arms)], rows)


def _detail(t: _Table, name: str, compared: Mapping[tuple[str, str], tuple[Comparison, float]]) -> str:
    rows = []
    for arm in t.arms(name):
        run, values = t.run[name, arm], list(t.values(name, arm, "final").values())
        edge = " (edge)" if t.at_edge(name, arm) else ""
        lost = sum(not row["finite"] for row in t.cells[name, arm].values())
        tail = ["", "", "", ""]
        if (name, arm) in compared:
            c, p = compared[name, arm]
            tail = [difference(c, p), f"{c.p:.4f}", f"{p:.3f}", f"{c.wilcoxon:.4f}"]
        second = "" if run.second is None else f"; {number(run.second)}"
        chosen = f"{number(run.learning_rate)}{second}{edge}"
        rows.append([shown(arm), chosen, spread(values), str(len(values)), str(lost), *tail])
    sharp = next(iter(t.run[name, arm].sharpness for arm in t.arms(name)))
    header = [
        "arm",
        "learning rate; second",
        "per cent",
        "seeds",
        "not finite",
        "difference",
        "p",
        "p, Holm",
        "Wilcoxon",
    ]
    return (f"Sharpness {sharp:g}.\n\n" if sharp is not None else "") + lines(header, rows)
