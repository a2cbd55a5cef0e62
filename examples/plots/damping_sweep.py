"""Accuracy against the damping, beside plain training and damping "auto" (benchmarks/results/auto_damping.jsonl)."""

import json
from pathlib import Path

import numpy as np

from examples.plots.style import BLUE, RED, SKY, figure
from examples.plots.training_curves import ROWS, band

TASKS = {
    "A": "10 images ranked,\nloss in the log domain",
    "D": "5 images ranked, sharp,\ntextbook loss",
    "E": "single images\nclassified",
    "F": "the same,\n30 % random labels",
}


def chosen(runs: list[dict], task: str, arm: str) -> np.ndarray:
    """One accuracy for each seed, at the task's own learning rate, schedule and batch size."""
    of_task = [r for r in runs if r["task"] == task]
    first = {key: of_task[0][key] for key in ("learning_rate", "schedule", "batch")}
    return np.array([r["accuracy"] for r in of_task if r["arm"] == arm and first.items() <= r.items()])


def draw(path: Path) -> None:
    runs = [json.loads(line) for line in (ROWS.parent / "auto_damping.jsonl").read_text().splitlines()]
    arms = {arm: float(arm.split()[1]) for arm in dict.fromkeys(r["arm"] for r in runs) if arm[:8] == "Fisher 0"}
    with figure(path, 9, 6.6, rows=2, columns=2, sharex=True) as (drawing, axes):
        for axis, (task, title) in zip(axes.flat, TASKS.items(), strict=True):
            for arm, color, line in (("plain", SKY, "--"), ("Fisher auto", BLUE, "-")):
                mean, half = band(chosen(runs, task, arm))
                label = {"plain": "plain training", "Fisher auto": 'damping "auto"'}[arm]
                axis.axhline(mean, color=color, ls=line, label=label)
                axis.axhspan(mean - half, mean + half, color=color, alpha=0.15, lw=0)
            means, halves = zip(*(band(chosen(runs, task, arm)) for arm in arms), strict=True)
            axis.errorbar(arms.values(), means, halves, fmt="o-", color=RED, capsize=5, label="fixed damping")
            axis.set(title=title, xscale="log", xlim=(5e-4, 2e-1), ylim=(max(0, axis.get_ylim()[0]), None))
        for axis in axes[1]:
            axis.set_xlabel("damping (log scale)")
        for axis in axes[:, 0]:
            axis.set_ylabel("accuracy, %")
        drawing.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
