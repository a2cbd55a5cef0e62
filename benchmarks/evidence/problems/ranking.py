"""Ranking supervision: numbers of which only the order is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from benchmarks.evidence.data.images import Part
from benchmarks.evidence.data.number_lists import NumberLists
from benchmarks.evidence.problems.problem import LEFT_OUT_OF_OTHER_IMAGES, Batches, RowsLoss
from torch import Tensor, nn

from newton_plugin.algorithms import RankingLoss, SortingNetwork, neural_sort, soft_sort

__all__ = ["Ranking", "ranking_problems"]

METHODS = {
    "neural_sort": ("NeuralSort", (0.03, 0.1, 0.3)),
    "soft_sort": ("SoftSort", (0.03, 0.1, 0.3)),
    "logistic": ("logistic network", (3.0, 10.0, 30.0)),
    "cauchy": ("Cauchy network", (3.0, 10.0, 30.0)),
}


@dataclass(frozen=True)
class Ranking:
    """Lists of ``n`` numbers of ``digits`` digits.

    Attributes:
        method: a key of METHODS.
        wrong: share of the training lists whose order is replaced by a random one.
        convolutions: the paper's CNN in place of a perceptron.
        folder: with MNIST; None: scikit-learn's digits.
        device: where the images of the training lists are.
    """

    name: str
    title: str
    method: str
    n: int
    sharpnesses: tuple[float, ...]
    digits: int
    table: str = "ranking"
    steps: int = 1000
    batch: int = 32
    wrong: float = 0.0
    convolutions: bool = False
    folder: str | None = None
    device: str = "cpu"
    optimizer: Literal["adam", "sgd"] = "adam"
    without: tuple[str, ...] = ()

    def network(self) -> nn.Module:
        height = 8 if self.folder is None else 28
        pixels = height * height * self.digits
        if self.convolutions:
            return _cnn(height, height * self.digits)
        wide = 64 if self.folder is None else 128
        layers = [nn.Linear(pixels, wide), nn.ReLU(), nn.Linear(wide, 32), nn.ReLU(), nn.Linear(32, 1)]
        return nn.Sequential(nn.Flatten(-2), *layers, nn.Flatten(-2))

    def _lists(self, part: Part) -> NumberLists:
        return NumberLists(part, self.n, self.digits, self.folder, self.device)

    def batches(self, seeds: Sequence[int], batch: int, steps: int) -> Batches:
        lists = self._lists("train")
        noise = [torch.Generator().manual_seed(seed + 10**6) for seed in seeds]
        for drawn in zip(*(lists.draw(steps, batch, seed) for seed in seeds), strict=True):
            ranks = [self._corrupted(r, g) for (_, r), g in zip(drawn, noise, strict=True)]
            yield torch.stack([images for images, _ in drawn]), torch.stack(ranks)

    def _corrupted(self, ranks: Tensor, generator: torch.Generator) -> Tensor:
        if not self.wrong:
            return ranks
        wrong = torch.rand(len(ranks), 1, generator=generator) < self.wrong
        return torch.where(wrong, torch.rand(ranks.shape, generator=generator).argsort(-1), ranks)

    def held_out(self, part: Part) -> tuple[Tensor, Tensor]:
        return _held_out(part, self.n, self.digits, self.folder)

    def loss(self, sharpness: float | None, seeds: Sequence[int], textbook: bool) -> RowsLoss:
        assert sharpness is not None
        if textbook:
            return _textbook(self.method, self.n, sharpness)
        if self.method in ("neural_sort", "soft_sort"):
            return RankingLoss(self.method, temperature=sharpness, reduction="none")
        network = {"swap": self.method, "steepness": sharpness}
        return RankingLoss("sorting_network", layout="odd_even", reduction="none", **network)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argsort(-1).argsort(-1) == targets).all(-1).double()


@cache
def _held_out(part: Part, n: int, digits: int, folder: str | None) -> tuple[Tensor, Tensor]:
    ((images, ranks),) = NumberLists(part, n, digits, folder).draw(1, 1000, {"validation": 1, "test": 2}[part])
    return images, ranks


def _textbook(method: str, n: int, sharpness: float) -> RowsLoss:
    """Binary cross-entropy of the soft permutation matrix, which knows nothing of logarithms."""
    network = SortingNetwork(n, swap=method, steepness=sharpness) if method in ("logistic", "cauchy") else None

    def loss(scores: Tensor, ranks: Tensor) -> Tensor:
        if network is not None:
            soft = network(scores)[1]
        else:
            soft = {"neural_sort": neural_sort, "soft_sort": soft_sort}[method](scores, sharpness)
        hard = nn.functional.one_hot(ranks, ranks.shape[-1]).mT.to(soft.dtype)  # rows are ranks
        return nn.functional.binary_cross_entropy(soft.clamp(0, 1), hard, reduction="none").mean((-2, -1))

    return loss


class _EachImage(nn.Module):
    """(..., n, h, w) as images of one channel through a network, to (..., n)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.reshape(-1, 1, *x.shape[-2:])).reshape(x.shape[:-2])


def _cnn(height: int, width: int) -> nn.Module:
    """The paper's: two convolutions of 5 x 5 with 32 and 64 channels, pooling, 64 hidden units.

    Pooling comes before the rectifier: the same function, and a quarter of the numbers to rectify.
    """
    h, w = ((height - 4) // 2 - 4) // 2, ((width - 4) // 2 - 4) // 2
    convolutions = [nn.Conv2d(1, 32, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(32, 64, 5), nn.MaxPool2d(2), nn.ReLU()]
    return _EachImage(
        nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64 * h * w, 64), nn.ReLU(), nn.Linear(64, 1))
    )


def ranking_problems(scale: str, folder: str | None, device: str = "cpu") -> list[Ranking]:
    """Table 1, and what the search for a rule looks at beside it."""
    paper = {"digits": 4, "steps": 100_000, "batch": 100, "convolutions": True, "table": "ranking_paper"}
    options = {"digits": 2} if scale == "cpu" else paper
    problems = [
        Ranking(f"{method}_{n}", f"{title}, n = {n}", method, n, grid, folder=folder, device=device, **options)
        for method, (title, grid) in METHODS.items()
        for n in (5, 10)
    ]
    if scale == "cpu":
        single: dict = {"digits": 1, "folder": folder, "device": device, "table": "more", "method": "neural_sort"}
        single |= {} if folder is None else {"without": LEFT_OUT_OF_OTHER_IMAGES}
        problems += [
            Ranking("single_sharp", "NeuralSort .01, n = 5, single digits", n=5, sharpnesses=(0.01,), **single),
            Ranking("single_10", "NeuralSort .1, n = 10, single digits", n=10, sharpnesses=(0.1,), **single),
            Ranking("wrong_lists", "NeuralSort .1, n = 5, 30 % wrong", n=5, sharpnesses=(0.1,), wrong=0.3, **single),
        ]
    return problems
