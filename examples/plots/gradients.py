"""The gradient of two sorting losses while one of five scores moves, plain and after the Newton step.

After figure 6 of Petersen et al., NeurIPS 2024. The other scores stay where they are; C is that of 2,000 random lists
(standard normal scores, random orders), as in a batch at the start of a training, and every point of the line is
stepped with it. What is drawn is the entry of the moving score: how hard it is pushed, and which way.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import newton_plugin as npl
from examples.plots.style import BLACK, BLUE, figure
from newton_plugin.algorithms import RankingLoss, SortingNetwork, neural_sort

NETWORK = {"layout": "odd_even", "swap": "logistic", "steepness": 10.0}
LOSSES = (
    ("NeuralSort", RankingLoss("neural_sort", temperature=0.1), lambda y: neural_sort(y, 0.1)),
    ("logistic network", RankingLoss("sorting_network", **NETWORK), lambda y: SortingNetwork(5, **NETWORK)(y)[1]),
)
OTHERS = torch.tensor([-1.0, -0.4, 0.5, 1.1], dtype=torch.float64)
RANKS = torch.tensor([2, 0, 1, 3, 4])  # the first score belongs between -0.4 and 0.5


RANDOM = torch.Generator().manual_seed(0)


def lists(points: int = 401, random: int = 2000) -> tuple[Tensor, Tensor]:
    """Scores (points + random, 5), first the lists in which only the first score moves; and the true ranks."""
    moving = torch.linspace(-4, 4, points, dtype=torch.float64)
    scores = torch.randn(points + random, 5, generator=RANDOM, dtype=torch.float64)
    scores[:points] = torch.cat([moving[:, None], OTHERS.expand(points, 4)], 1)
    ranks = torch.rand(points + random, 5, generator=RANDOM).argsort(1)
    ranks[:points] = RANKS
    return scores, ranks


def textbook(matrix: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """BCELoss on the soft permutation matrix, as one would write it down first."""

    def loss(scores: Tensor, ranks: Tensor) -> Tensor:
        return torch.nn.BCELoss()(matrix(scores), torch.nn.functional.one_hot(ranks, 5).mT.to(scores.dtype))

    return loss


def draw(path: Path, points: int = 401) -> None:
    scores, ranks = lists(points)
    with figure(path, 9, 6, rows=2, columns=2, sharex=True) as (drawing, axes):
        for row, (name, stable, matrix) in zip(axes, LOSSES, strict=True):
            for loss, y, color, line, label in (
                (textbook(matrix), scores.float(), BLACK, ":", "BCELoss of the matrix, float32"),
                (stable, scores, BLUE, "-", "RankingLoss"),
            ):
                newton = npl.newton_step(loss, y, ranks, structure="mean")
                for axis, field in zip(row, (newton.gradient, newton.step), strict=True):
                    relative = field / field.square().mean().sqrt()
                    axis.plot(scores[:points, 0], relative[:points, 0], line, color=color, label=label)
            for axis in row:
                axis.axvspan(-0.4, 0.5, color="#DDDDDD", lw=0)
                axis.axhline(0, color=BLACK, lw=0.8, zorder=0)
            row[0].set_ylabel(name)
        for axis, title in zip(axes[0], ("gradient", "Newton step"), strict=True):
            axis.set_title(title)
        for axis in axes[1]:
            axis.set_xlabel("the score that moves")
        drawing.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
