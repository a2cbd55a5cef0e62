"""Fields of steps (the paper's Figure 6): where a loss pushes two of three scores, by its gradient and by each rule."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from benchmarks.evidence.problems.ranking import METHODS
from benchmarks.evidence.tables.markdown import lines
from torch import Tensor

import newton_plugin as npl
from newton_plugin.algorithms import RankingLoss

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["RULES", "field", "write_fields"]

RULES: dict[str, dict] = {
    "gradient": {},
    "soft normalisation": {"curvature": "norm"},
    "default": {},
    "Fisher, matrix": {"structure": "mean"},
    "Hessian": {"curvature": "hessian"},
    "Hessian per sample": {"curvature": "hessian", "structure": "per_sample"},
}
SIZE, REACH = 15, 1.5  # points along an axis, and how far they go to either side


def _loss(method: str) -> RankingLoss:
    """At the middle of the sharpnesses that the report chooses from."""
    sharp = METHODS[method][1][1]
    if method in ("neural_sort", "soft_sort"):
        return RankingLoss(method, temperature=sharp)
    return RankingLoss("sorting_network", swap=method, steepness=sharp, layout="odd_even")


def field(method: str, rule: str) -> tuple[Tensor, Tensor]:
    """Scores (P, 2) and what is subtracted from them (P, 2); the points are one batch.

    The third score is 0; the right order is: first, third, second. So the right region is the upper left quarter.
    """
    axis = torch.linspace(-REACH, REACH, SIZE, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    scores = torch.stack((points[:, 0], points[:, 1], torch.zeros(len(points), dtype=torch.float64)), 1)
    ranks = torch.tensor([0, 2, 1]).expand(len(points), -1)
    step = npl.newton_step(_loss(method), scores.requires_grad_(), ranks, **RULES[rule])
    taken = step.gradient if rule == "gradient" else step.step
    return points, taken[:, :2].detach()


def write_fields(out: Path) -> list[Path]:
    """``<out>_fields.png`` and ``.md``: arrows, and how unequal they are."""
    paths = [out.with_name(f"{out.name}_fields{suffix}") for suffix in (".png", ".md")]
    figure, axes = plt.subplots(len(METHODS), len(RULES), figsize=(2.2 * len(RULES), 1.9 * len(METHODS)), squeeze=False)
    rows = []
    for row, (method, (title, grid)) in enumerate(METHODS.items()):
        cells = []
        for column, rule in enumerate(RULES):
            points, taken = field(method, rule)
            length = taken.norm(dim=1)
            high, middle, low = (float(length.quantile(q)) for q in (1.0, 0.5, 0.1))
            cells.append(f"{high / middle:.3g}, {middle / low:.3g}")
            # Directions as arrows of one length, lengths as colour: long arrows would hide the others.
            arrows = -taken / length.clamp_min(1e-300).unsqueeze(1)
            plot = axes[row, column]
            decades = (length / high).clamp_min(1e-300).log10().clamp(min=-6)
            plot.quiver(
                *points.T, *arrows.T, decades, cmap="viridis_r", clim=(-6, 0), pivot="mid", scale=20, width=0.008
            )
            plot.set(xticks=[], yticks=[], aspect="equal")
            if row == 0:
                plot.set_title(rule, fontsize=9)
            if column == 0:
                plot.set_ylabel(f"{title}, {grid[1]:g}", fontsize=9)
        rows.append([f"{title}, {grid[1]:g}", *cells])
    colours = figure.colorbar(axes[0, 0].collections[0], ax=axes, shrink=0.5)
    colours.set_label("log10 of the length over the longest")
    figure.savefig(paths[0], dpi=70, bbox_inches="tight")
    plt.close(figure)
    text = (
        "# Evidence: fields of steps\n\nMade by `python -m benchmarks.evidence fields`. Lists of three whose third "
        "score is 0: where the first two are pushed (the right order: first, third, second), at a grid of 15 x 15 "
        "points between -1.5 and 1.5, which are one batch. Longest over median length, median over tenth percentile: "
        f"1, 1 is a field of equal lengths.\n\n![fields]({paths[0].name})\n\n"
    )
    paths[1].write_text(text + lines(["loss, sharpness", *RULES], rows) + "\n")
    return paths
