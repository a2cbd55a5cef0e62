"""Learning to rank by relevance: the metric itself, NDCG, made differentiable.

No package that this one depends on ships a real learning-to-rank set (scikit-learn fetches none either), so queries are
lists of real digits: a document is a two-digit number, its grade the fifth of the range that the number is in. As in
the usual sets grades are 0 to 4, gains exponential, and only the first positions count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch
from benchmarks.evidence.data.images import Part
from benchmarks.evidence.data.written_numbers import write_numbers
from benchmarks.evidence.problems.problem import Batches, RowsLoss
from torch import Tensor, nn

from newton_plugin.algorithms import ndcg_loss

__all__ = ["GRADES", "Relevance", "ndcg"]

GRADES = 5
_DIGITS = 2


@dataclass(frozen=True)
class Relevance:
    """Lists of ``n`` documents, judged by the order of the first ``k``.

    Attributes:
        folder: with MNIST; None: scikit-learn's digits.
        wrong: share of the training lists whose grades are in a random order.
    """

    name: str
    title: str
    n: int = 10
    k: int = 5
    sharpnesses: tuple[float, ...] = (0.1, 0.3, 1.0)
    table: str = "beyond"
    steps: int = 500
    batch: int = 16
    folder: str | None = None
    optimizer: Literal["adam", "sgd"] = "adam"
    without: tuple[str, ...] = ("plain, textbook",)
    wrong: float = 0.0

    def network(self) -> nn.Module:
        pixels = _DIGITS * (64 if self.folder is None else 784)
        layers = [nn.Linear(pixels, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)]
        return nn.Sequential(nn.Flatten(-2), *layers, nn.Flatten(-2))

    def batches(self, seeds: Sequence[int], batch: int, steps: int) -> Batches:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = [torch.Generator().manual_seed(seed + 10**6) for seed in seeds]
        for _ in range(steps):
            drawn = [_lists("train", batch, self.n, g, self.folder) for g in generators]
            grades = [self._corrupted(r, g) for (_, r), g in zip(drawn, noise, strict=True)]
            yield torch.stack([images for images, _ in drawn]), torch.stack(grades)

    def _corrupted(self, grades: Tensor, generator: torch.Generator) -> Tensor:
        if not self.wrong:
            return grades
        wrong = torch.rand(len(grades), 1, generator=generator) < self.wrong
        return torch.where(wrong, grades.gather(-1, torch.rand(grades.shape, generator=generator).argsort(-1)), grades)

    def held_out(self, part: Part) -> tuple[Tensor, Tensor]:
        return _held_out(part, self.n, self.folder)

    def loss(self, sharpness: float | None, seeds: Sequence[int], textbook: bool) -> RowsLoss:
        assert sharpness is not None
        # The package's loss is the mean over lists: of one list at a time it is that list's.
        return torch.func.vmap(partial(ndcg_loss, method="neural_sort", k=self.k, temperature=sharpness))

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ndcg(outputs, targets, self.k)


def ndcg(scores: Tensor, relevance: Tensor, k: int) -> Tensor:
    """Exact, with exponential gains: scores (..., n), relevance (..., n) -> (...); 1 where nothing is relevant."""
    discount = torch.log2(torch.arange(2, k + 2, dtype=torch.float64)).reciprocal()
    gains = (torch.exp2(relevance.double()) - 1).expand(scores.shape)
    order = scores.argsort(-1, descending=True)[..., :k]
    found = (gains.gather(-1, order) * discount).sum(-1)
    ideal = (gains.sort(-1, descending=True).values[..., :k] * discount).sum(-1)
    return torch.where(ideal > 0, found / ideal.clamp_min(1e-12), 1.0)


def _lists(part: Part, count: int, n: int, generator: torch.Generator, folder: str | None) -> tuple[Tensor, Tensor]:
    images, numbers = write_numbers(part, (count, n), _DIGITS, generator, folder)
    return images, numbers * GRADES // 10**_DIGITS


@cache
def _held_out(part: Part, n: int, folder: str | None) -> tuple[Tensor, Tensor]:
    seed = {"validation": 1, "test": 2}[part]
    return _lists(part, 500, n, torch.Generator().manual_seed(seed), folder)
