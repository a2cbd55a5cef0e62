"""Training curves with 95 % bands, from the rows that the demo wrote (benchmarks/results/demo.json)."""

import json
from pathlib import Path

import numpy as np
from scipy.stats import t as student

from examples.plots.style import BLACK, BLUE, RED, SKY, figure

STYLES = {
    "textbook": (BLACK, ":"),
    "textbook + Newton": (RED, "-."),
    "stable": (SKY, "--"),
    "stable + Newton": (BLUE, "-"),
}
ROWS = Path(__file__).parents[2] / "benchmarks" / "results" / "demo.json"


def band(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the seeds (rows) and half the width of its 95 % interval (Student's t)."""
    half = student.ppf(0.975, len(curves) - 1) * curves.std(0, ddof=1) / len(curves) ** 0.5
    return curves.mean(0), half


def draw(path: Path) -> None:
    runs = json.loads(ROWS.read_text())
    settings = list(dict.fromkeys(run["setting"] for run in runs))
    with figure(path, 9, 5.6, columns=len(settings), sharey=True) as (drawing, axes):
        for axis, setting in zip(axes[0], settings, strict=True):
            for arm, (color, line) in STYLES.items():
                curves = np.array([r["validation"] for r in runs if (r["setting"], r["arm"]) == (setting, arm)])
                steps, (mean, half) = curves[0, :, 0], band(100 * curves[:, :, 1])
                axis.plot(steps, mean, line, color=color, label=arm)
                axis.fill_between(steps, mean - half, mean + half, color=color, alpha=0.2, lw=0)
            images, temperature, _ = setting.split(", ")
            axis.set(title=f"{images},\n{temperature}", xlabel="training step", ylim=(0, 100))
            axis.set_xticks((0, 500, 1000, 1500))
            axis.grid(alpha=0.3)
        axes[0, 0].set_ylabel("lists ranked fully right, %")
        drawing.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
