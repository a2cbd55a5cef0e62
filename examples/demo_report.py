"""The demo's tables and its picture, made from the list of runs and from nothing else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from rich import box
from rich.table import Table
from scipy.stats import t as student

from examples.demo_arms import Arm, Setting

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Runs = list[dict[str, Any]]

# Okabe and Ito's colours, which stay apart for colour-blind readers; line styles repeat the message.
STYLES = {
    "textbook": ("#000000", ":"),
    "textbook + Newton": ("#D55E00", "-"),
    "stable": ("#56B4E9", "--"),
    "stable + Newton": ("#0072B2", "-"),
    "stable + full matrix": ("#009E73", "-."),
}


def values(runs: Runs, setting: Setting, arm: str, key: str) -> np.ndarray:
    """One value for each seed, in the order of the seeds."""
    chosen = [r for r in runs if r["setting"] == setting.title and r["arm"] == arm]
    return np.array([r[key] for r in sorted(chosen, key=lambda r: r["seed"])])


def paired_difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Mean difference over seeds, and the half width of its 95 % interval (Student's t; nan for one seed)."""
    d = ours - theirs
    if len(d) < 2:
        return float(d.mean()), float("nan")
    return float(d.mean()), float(student.ppf(0.975, len(d) - 1) * d.std(ddof=1) / len(d) ** 0.5)


def table(runs: Runs, setting: Setting) -> Table:
    """A row for each arm: accuracy on the test images, time, and the paired difference."""
    seeds = len(values(runs, setting, setting.arms[0].name, "full"))
    title = f"{setting.title}; {seeds} seeds, mean (sd)"
    result = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    headers = ("loss", "rankings\nright, %", "elements\nright, %", "seconds", "difference in\nrankings right")
    for header in headers:
        result.add_column(header, justify="left" if header == "loss" else "right", no_wrap=True)
    for arm in setting.arms:
        shares = [_mean_sd(100 * values(runs, setting, arm.name, key)) for key in ("full", "elements")]
        seconds = _mean_sd(values(runs, setting, arm.name, "seconds"))
        result.add_row(arm.name, *shares, seconds, _difference(runs, setting, arm))
    return result


def _mean_sd(x: np.ndarray) -> str:
    return f"{x.mean():.1f} ({x.std(ddof=1):.1f})" if len(x) > 1 else f"{x.mean():.1f}"


def _difference(runs: Runs, setting: Setting, arm: Arm) -> str:
    if not arm.against:
        return ""
    ours, theirs = (100 * values(runs, setting, name, "full") for name in (arm.name, arm.against))
    mean, half = paired_difference(ours, theirs)
    return f"{mean:+.1f}" + f" [{mean - half:.1f}, {mean + half:.1f}]" * (len(ours) > 1)


def plot(runs: Runs, settings: Sequence[Setting], path: Path) -> None:
    """Validation curves, mean and one standard deviation over the seeds; a panel for each setting."""
    with plt.rc_context({"font.size": 17}):
        figure, axes = plt.subplots(1, len(settings), figsize=(14, 7.5), sharey=True, squeeze=False)
        for ax, setting in zip(axes[0], settings, strict=True):
            for arm in setting.arms:
                color, style = STYLES[arm.name]
                curves = values(runs, setting, arm.name, "validation")  # (seeds, points, 2)
                steps, share = curves[0, :, 0], 100 * curves[..., 1]
                low, high = share.mean(0) - share.std(0), share.mean(0) + share.std(0)
                ax.plot(steps, share.mean(0), style, color=color, lw=3.5, label=arm.name)
                ax.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
            ax.set_title(setting.title, fontsize=17)
            ax.set(xlabel="training step", ylim=(0, 100))
            ax.grid(alpha=0.3)
        axes[0, 0].set_ylabel("rankings fully right, %\n(validation images)")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=3, frameon=False)
        figure.tight_layout(rect=(0, 0.13, 1, 1))
        figure.savefig(path, dpi=100)
        plt.close(figure)
