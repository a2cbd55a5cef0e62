"""A loss over two of its inputs, with the way down before and after the Newton step.

The sorting loss of a Cauchy network on three scores, one of them held at 0: a plateau with a ridge before it, where
gradients are long on the ridge, short on the plateaus, and sometimes point along the ridge instead of across. The
step is that of the whole grid of points as one batch, with all settings at their defaults.
"""

from pathlib import Path

import torch
from torch import Tensor

import newton_plugin as npl
from examples.plots.style import LANDSCAPE, YELLOW, figure
from newton_plugin.algorithms import RankingLoss

NETWORK = RankingLoss("sorting_network", swap="cauchy", steepness=5.0, reduction="none")


def loss(y: Tensor) -> Tensor:
    """(N, 2) -> (N,): the true order of (y1, y2, 0) is y1 < 0 < y2."""
    scores = torch.cat([y, torch.zeros_like(y[:, :1])], 1)
    return NETWORK(scores, torch.tensor([0, 2, 1]).expand(len(y), 3))


def grid(points: int, limit: float) -> Tensor:
    """(points^2, 2), the first coordinate running fastest."""
    line = torch.linspace(-limit, limit, points, dtype=torch.float64)
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 2)


def draw(path: Path) -> str:
    """Returns how much the lengths of the arrows differ."""
    report = []
    fine, coarse = grid(141, 2.2), grid(13, 2.0)
    line, values = fine[:141, 0].numpy(), loss(fine).reshape(141, 141).numpy()
    newton = npl.newton_step(loss, coarse)
    arrows = {"gradient": -newton.gradient, "Newton step": -newton.step}
    with figure(path, 9, 5.1, columns=2, sharey=True) as (drawing, axes):
        for axis, (name, field) in zip(axes[0], arrows.items(), strict=True):
            shades = axis.contourf(line, line, values, 14, cmap=LANDSCAPE)
            x, y, dx, dy = (*coarse.T, *(field / field.norm(dim=1).mean()).T)
            axis.quiver(x, y, dx, dy, color="white", angles="xy", scale_units="xy", scale=3.4, width=0.008, zorder=3)
            spread = field.norm(dim=1).max() / field.norm(dim=1).median()
            report.append(f"{name}: longest {spread:.1f} times the median")
            axis.set(title=f"{name}\nlongest {spread:.1f} x median", xlabel="score $y_1$", aspect="equal")
            axis.plot(-1.2, 1.2, "*", color=YELLOW, ms=20, mec="black", zorder=4)
        axes[0, 0].set_ylabel("score $y_2$")
        drawing.colorbar(shades, ax=axes[0], label="loss", shrink=0.75, ticks=[])
    return "; ".join(report)
