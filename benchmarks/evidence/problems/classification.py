"""Plain classification of single digits: no gain is expected here, and no rule may do harm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from benchmarks.evidence.data.images import Part, digit_images
from benchmarks.evidence.problems.problem import LEFT_OUT_OF_OTHER_IMAGES, Batches, RowsLoss
from torch import Tensor, nn

__all__ = ["NEIGHBOURS", "Classification", "classification_problems"]

NEIGHBOURS = (2, 7, 0, 8, 9, 6, 5, 1, 3, 4)
"""What a digit is mistaken for: 0 and 2, 1 and 7, 3 and 8, 4 and 9, 5 and 6. Pairs that look alike, by hand."""

# Five networks for images (h, w), from the simplest on.
MODELS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda pixels: nn.Linear(pixels, 10),
    "one layer": lambda pixels: nn.Sequential(nn.Linear(pixels, 32), nn.ReLU(), nn.Linear(32, 10)),
    "two layers": lambda pixels: nn.Sequential(
        nn.Linear(pixels, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    ),
    "three layers, tanh": lambda pixels: nn.Sequential(
        nn.Linear(pixels, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10)
    ),
    "wide": lambda pixels: nn.Sequential(nn.Linear(pixels, 256), nn.GELU(), nn.Linear(256, 10)),
}


@dataclass(frozen=True)
class Classification:
    """Cross-entropy on single images.

    Attributes:
        model: a key of MODELS.
        random_labels: share of the training labels that are drawn anew from all ten digits.
        to_neighbours: such a label becomes the digit's neighbour (NEIGHBOURS) instead, and is always wrong.
        folder: with MNIST; None: scikit-learn's digits.
    """

    name: str
    title: str
    model: str
    optimizer: Literal["adam", "sgd"]
    batch: int = 32
    random_labels: float = 0.0
    folder: str | None = None
    table: str = "no_harm"
    steps: int = 600
    sharpnesses: tuple[float, ...] = ()
    without: tuple[str, ...] = ("plain, textbook",)
    to_neighbours: bool = False

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(-2), MODELS[self.model](64 if self.folder is None else 784))

    def batches(self, seeds: Sequence[int], batch: int, steps: int) -> Batches:
        images, labels = digit_images("train", self.folder)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        given = torch.stack([self._labels(labels, g) for g in generators])
        which = torch.arange(len(seeds)).unsqueeze(1)
        for _ in range(steps):
            index = torch.stack([torch.randint(len(labels), (batch,), generator=g) for g in generators])
            yield images[index], given[which, index]

    def _labels(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        redrawn = torch.rand(len(labels), generator=generator) < self.random_labels
        drawn = torch.randint(10, labels.shape, generator=generator)  # drawn in any case: the batches stay the same
        return torch.where(redrawn, torch.tensor(NEIGHBOURS)[labels] if self.to_neighbours else drawn, labels)

    def held_out(self, part: Part) -> tuple[Tensor, Tensor]:
        return tuple(digit_images(part, self.folder))  # type: ignore[return-value]

    def loss(self, sharpness: float | None, seeds: Sequence[int], textbook: bool) -> RowsLoss:
        return nn.CrossEntropyLoss(reduction="none")

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(-1) == targets).double()


def classification_problems(folder: str | None) -> list[Classification]:
    """Table 4 of the paper, and two that are known to be hard for a curvature: wrong labels, small batches."""
    problems = [
        Classification(f"{model.replace(', ', '_').replace(' ', '_')}_{o}", f"{model}, {o}", model, o, folder=folder)
        for model in MODELS
        for o in ("adam", "sgd")
    ]
    more: dict = {"model": "two layers", "optimizer": "adam", "folder": folder, "table": "more"}
    more |= {} if folder is None else {"without": ("plain, textbook", *LEFT_OUT_OF_OTHER_IMAGES)}
    problems.append(Classification("wrong_labels", "classes, 30 % random labels", random_labels=0.3, **more))
    problems.append(Classification("batch_4", "classes, batches of 4", batch=4, **more))
    return problems
