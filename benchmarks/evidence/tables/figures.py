"""Curves of the report against steps and against seconds, from the lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.training.arms import ARMS, BASELINE, shown
from benchmarks.evidence.training.plan import Done
from benchmarks.evidence.training.runs import Run

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["SHOWN", "curves"]

# Okabe and Ito's colours; a line style says the same again.
SHOWN = {
    BASELINE: ("#000000", ":"),
    "normalised": ("#999999", "--"),
    "soft normalisation": ("#56B4E9", "--"),
    "isotropic": ("#009E73", "-."),
    "batch size": ("#CC79A7", "-"),
    "Fisher": ("#0072B2", "-"),
    "Hessian": ("#E69F00", "-."),
    "our rule": ("#D55E00", "-"),
    "gated": ("#D55E00", "--"),
}


def curves(path: Path, names: Sequence[str], every: Mapping[str, Problem], done: Done, times: Mapping) -> None:
    """One row of panels against steps and, where steps were timed, one against seconds.

    Test scores: mean over the report seeds, band of one standard error.
    """
    timed = [name for name in names if name in times]
    rows = 2 if timed else 1
    figure, axes = plt.subplots(rows, len(names), figsize=(3.6 * len(names), 3.2 * rows), squeeze=False)
    for column, name in enumerate(names):
        for arm in [arm for arm in SHOWN if arm in ARMS]:
            found = [row["curve"] for run, row in done.items() if _is(run, name, arm)]
            if not found:
                continue
            points = np.array(found)  # (seeds, checkpoints, 3)
            steps, mean = points[0, :, 0], points[..., 2].mean(0)
            error = points[..., 2].std(0) / len(points) ** 0.5
            color, style = SHOWN[arm]
            for row, scale in [(0, 1.0), (1, times.get(name, {}).get(arm, 0) / 1000)][:rows]:
                if scale:
                    axes[row, column].plot(scale * steps, mean, style, color=color, label=shown(arm))
                    axes[row, column].fill_between(
                        scale * steps, mean - error, mean + error, color=color, alpha=0.2, lw=0
                    )
        axes[0, column].set(title=every[name].title, xlabel="step")
        if rows == 2:
            axes[1, column].set(xlabel="seconds")
    for row in range(rows):
        axes[row, 0].set_ylabel("test, %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.08 / rows, 1, 1))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _is(run: Run, name: str, arm: str) -> bool:
    return run.purpose == "report" and run.problem == name and run.arm == arm
