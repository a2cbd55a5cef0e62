"""A picture of the metric during training: each arm at its best rate, mean over seeds and one deviation about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from newton_plugin_lightning._compare.lines import Line
from newton_plugin_lightning._compare.plan import Plan
from newton_plugin_lightning._compare.results import Results

__all__ = ["draw", "mean_curve"]

Curve = Sequence[tuple[float, float, float]]


def mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> Curve:
    """(step, mean, standard deviation) at the steps that all curves have; the deviation of one curve is 0.

    >>> mean_curve([[(1, 2.0), (2, 4.0)], [(1, 4.0), (2, 4.0), (3, 9.0)]])[1]
    (2, 4.0, 0.0)
    """
    found = [{point[0]: point[1] for point in curve} for curve in curves]
    common = sorted(set.intersection(*(set(curve) for curve in found))) if found else []
    made = []
    for step in common:
        values = [curve[step] for curve in found]
        mean = sum(values) / len(values)
        spread = (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5
        made.append((step, mean, spread))
    return made


def draw(results: Results, lines: Mapping[tuple[int, str, float], Line], path: Path) -> str | None:
    """Write a PNG; returns why there is none, or None."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return "no picture, because matplotlib is not installed (pip install matplotlib, then run the command again)"
    plan = results.plan
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    drawn = [_add(axes, arm, rate, style, plan, lines, results) for arm, rate, style in _shown(results)]
    if not any(drawn):
        return "no picture, because the metric was logged at no step that all seeds have in common"
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(plan.metric)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return None


def _shown(results: Results) -> list[tuple[str, float, str]]:
    """Arms at their best rates, and plain training at the user's own if that is another."""
    plain = results.chosen(results.plan.arms[0].name)
    own = [] if plain.rate == 1 else [(plain.arm, 1.0, "--")]
    return [*((arm.name, results.chosen(arm.name).rate, "-") for arm in results.plan.arms), *own]


def _add(
    axes: object,
    arm: str,
    rate: float,
    style: str,
    plan: Plan,
    lines: Mapping[tuple[int, str, float], Line],
    results: Results,
) -> bool:
    kept = [line for seed in plan.seeds if (line := lines[seed, arm, rate]).value is not None]
    curve = mean_curve([line.curve for line in kept])
    if not curve:
        return False
    steps, means, spreads = zip(*curve, strict=True)
    failed = f", {len(plan.seeds) - len(kept)} failed" if len(kept) < len(plan.seeds) else ""
    marker = "o" if len(steps) == 1 else None
    label = f"{arm}, rate {results.row(arm, rate).rate_name}{failed}"
    (line,) = axes.plot(steps, means, style, marker=marker, label=label)  # pyright: ignore[reportAttributeAccessIssue]
    low = [m - s for m, s in zip(means, spreads, strict=True)]
    high = [m + s for m, s in zip(means, spreads, strict=True)]
    fill = axes.fill_between  # pyright: ignore[reportAttributeAccessIssue]
    fill(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    return True
