"""Two heads on one trunk: a digit is classified, and the ink in its four quadrants is measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from benchmarks.evidence.data.images import Part, digit_images
from benchmarks.evidence.live.task import r_squared
from torch import Tensor, nn

__all__ = ["TwoHeads"]


class _Network(nn.Module):
    """Images (K, 8, 8) to logits (K, 10) and ink (K, 4).

    Attributes:
        logarithms: of both terms' variances; used where weights are learned.
    """

    def __init__(self, learned: bool) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.digit, self.ink = nn.Linear(32, 10), nn.Linear(32, 4)
        self.logarithms = nn.Parameter(torch.zeros(2)) if learned else None

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(images)
        return self.digit(features), self.ink(features)


@dataclass(frozen=True)
class TwoHeads:
    """Cross-entropy of the digit plus ``weight`` times the squared error of the ink (mean over its four numbers).

    The score counts both heads alike: the mean of the accuracy, per cent, and of 100 R^2 of the ink, at least 0.

    Attributes:
        weight: of the ink; None: both weights are learned, as in Kendall, Gal and Cipolla (2018, "Multi-task learning
            using uncertainty to weigh losses"): the sum of exp(-s_k) l_k + s_k with parameters s_k, 0 at first.
    """

    weight: float | None

    def network(self) -> nn.Module:
        return _Network(self.weight is None)

    def training(self, seed: int) -> tuple[Tensor, ...]:
        return _images_and_ink("train")

    def loss(self, network: _Network, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
        images, labels, ink = batch
        logits, measured = network(images)
        terms = nn.functional.cross_entropy(logits, labels), nn.functional.mse_loss(measured, ink)
        if self.weight is None:
            assert network.logarithms is not None
            return sum(((-s).exp() * term + s for s, term in zip(network.logarithms, terms, strict=True)), terms[0] * 0)
        return terms[0] + self.weight * terms[1]

    def score(self, network: _Network, part: Part) -> Tensor:
        images, labels, ink = _images_and_ink(part)
        logits, measured = network(images)
        accuracy = 100 * (logits.argmax(-1) == labels).double().mean()
        return (accuracy + r_squared(measured, ink).clamp_min(0)) / 2


@cache
def _images_and_ink(part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """Images (K, 8, 8), labels (K,), ink of the quadrants (K, 4) with mean 0 and deviation 1 over the training part."""
    images, labels = digit_images(part)
    ink, train = _ink(images), _ink(digit_images("train").images)
    return images, labels, (ink - train.mean(0)) / train.std(0)


def _ink(images: Tensor) -> Tensor:
    """(K, 8, 8) -> (K, 4): top left, top right, bottom left, bottom right."""
    return images.unfold(1, 4, 4).unfold(2, 4, 4).mean((-2, -1)).flatten(1)
