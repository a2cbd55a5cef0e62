"""The table and the figure of the fixed dampings (``training/damping.py``)."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.tables.markdown import lines, number
from benchmarks.evidence.tables.paired import compare
from benchmarks.evidence.training.arms import BASELINE, SEARCH_RATES
from benchmarks.evidence.training.damping import CURVATURES, DAMPINGS, fixed
from benchmarks.evidence.training.plan import Done, final
from matplotlib.axes import Axes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["damping_figure", "damping_table"]

Scores = Mapping[int, float]
Point = tuple[str, float | None]
"""An arm and its damping; None: "auto", or a plain gradient."""
FIXED_RATE = SEARCH_RATES[1]
# Okabe and Ito's colours; marker and line style say the same again.
STYLES = {
    "Fisher": ("#0072B2", "-", "o"),
    "Hessian": ("#E69F00", "-.", "s"),
    "Hessian per sample": ("#009E73", "--", "^"),
}


def _points(done: Done, problem: str) -> dict[Point, dict[float, Scores]]:
    """Final validation scores by arm and damping, learning rate, seed."""
    found: dict[Point, dict[float, dict[int, float]]] = {}
    for run, row in done.items():
        if run.problem == problem:
            rates = found.setdefault((run.arm, run.second), {})
            rates.setdefault(run.learning_rate, {})[run.seed] = final(row)
    return found  # type: ignore[return-value]


def _best(rates: Mapping[float, Scores]) -> Scores:
    """Of the learning rate with the best mean; of equals the first."""
    return rates[max(sorted(rates), key=lambda rate: statistics.mean(rates[rate].values()))]


def _at_fixed_rate(rates: Mapping[float, Scores]) -> Scores:
    return rates.get(FIXED_RATE, {})


READINGS: dict[str, Callable[[Mapping[float, Scores]], Scores]] = {
    "each point at its best learning rate of three": _best,
    f"all at the learning rate {FIXED_RATE:g}": _at_fixed_rate,
}


def _read(done: Done, problem: str, read: Callable[[Mapping[float, Scores]], Scores]) -> dict[Point, Scores]:
    """Points that were trained on more than one seed."""
    scores = {point: read(rates) for point, rates in _points(done, problem).items()}
    return {point: by_seed for point, by_seed in scores.items() if len(by_seed) > 1}


def damping_table(done: Done, every: Mapping[str, Problem]) -> str:
    """Markdown: for each problem accuracy against damping, at the best and at one learning rate."""
    names = [name for name in every if any(run.problem == name for run in done)]
    versions = sorted(
        {f"newton_plugin {r['newton_plugin']} ({r['commit']}), torch {r['torch']}" for r in done.values()}
    )
    lost = sum(not row["finite"] for row in done.values())
    kept = sum(row["kept"] > 0 for row in done.values())
    parts = [
        "# Evidence: damping",
        "Made by `python -m benchmarks.evidence tables` from evidence/damping.jsonl, by [the protocol](../PROTOCOL.md)."
        " Validation data, search seeds, per cent at the end: mean of the seeds, in brackets the difference to plain, "
        "stable; * p < .05 (exact sign flips, not corrected). The largest of seven dampings is chosen on the runs that "
        "it is read from, so the best of a row is flattered; plain has one point only.",
        f"{len(done)} runs, {lost} left the finite numbers, {kept} had a batch that kept its gradient. "
        f"{'; '.join(versions)}.",
    ]
    for name in names:
        run = next(run for run in done if run.problem == name)
        sharp = "" if run.sharpness is None else f", sharpness {run.sharpness:g}"
        parts.append(f"## {every[name].title} ({run.steps} steps of {run.batch}{sharp})")
        for title, read in READINGS.items():
            parts += [f"{title[0].upper()}{title[1:]}:", _rows(_read(done, name, read))]
    return "\n\n".join(parts) + "\n"


def _rows(points: Mapping[Point, Scores]) -> str:
    base = points.get((BASELINE, None), {})

    def cell(point: Point) -> str:
        scores = points.get(point, {})
        if not scores:
            return ""
        both = sorted(scores.keys() & base.keys())
        mean = f"{statistics.mean(scores.values()):.1f}"
        if point[0] == BASELINE or len(both) < 2:
            return mean
        c = compare([scores[s] for s in both], [base[s] for s in both])
        return f"{mean} ({c.mean:+.1f}{'*' if c.p < 0.05 else ''})"

    rows = [[BASELINE, cell((BASELINE, None)), *[""] * len(DAMPINGS)]]
    rows += [[c, cell((c, None)), *(cell((fixed(c), d)) for d in DAMPINGS)] for c in CURVATURES]
    return lines(["curvature", "auto", *(number(d) for d in DAMPINGS)], rows)


def damping_figure(path: Path, done: Done, every: Mapping[str, Problem]) -> None:
    """A column for each problem, a row for each reading; bands are one standard error."""
    names = [name for name in every if any(run.problem == name for run in done)]
    size = (5.2 * len(names), 3.6 * len(READINGS))
    figure, axes = plt.subplots(len(READINGS), len(names), figsize=size, squeeze=False, sharex=True, sharey="col")
    for row, (title, read) in enumerate(READINGS.items()):
        for column, name in enumerate(names):
            _panel(axes[row, column], _read(done, name, read))
            axes[row, column].set_title(f"{every[name].title}\n{title}", fontsize=9)
            axes[row, column].set_ylabel("validation, %")
        for column in range(len(names)):
            axes[-1, column].set_xlabel("damping")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2 * len(names), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.08 if len(names) > 1 else 0.15, 1, 1))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _panel(axes: Axes, points: Mapping[Point, Scores]) -> None:
    axes.set_xscale("log")
    if (BASELINE, None) in points:
        mean, error = _mean_and_error(points[BASELINE, None])
        axes.axhline(mean, color="#000000", ls=":", label=BASELINE)
        axes.axhspan(mean - error, mean + error, color="#000000", alpha=0.12, lw=0)
    for curvature in CURVATURES:
        color, style, marker = STYLES[curvature]
        trained = [d for d in DAMPINGS if (fixed(curvature), d) in points]
        if trained:
            both = [_mean_and_error(points[fixed(curvature), d]) for d in trained]
            mean, low, high = ([m + k * e for m, e in both] for k in (0, -1, 1))
            axes.plot(trained, mean, style, color=color, marker=marker, ms=4, label=f"{curvature}, fixed damping")
            axes.fill_between(trained, low, high, color=color, alpha=0.2, lw=0)
        if (curvature, None) in points:
            mean, _ = _mean_and_error(points[curvature, None])
            axes.axhline(mean, color=color, ls=style, lw=0.9, alpha=0.9, label=f'{curvature}, "auto"')


def _mean_and_error(scores: Scores) -> tuple[float, float]:
    values: Sequence[float] = list(scores.values())
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
