"""What a live problem trains: data, a network, a loss with its graph, and a score."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from benchmarks.evidence.data.images import Part
from torch import Tensor, nn

__all__ = ["Task", "r_squared"]


class Task(Protocol):
    """All that depends on the kind of the loss; what is random follows from a seed or a generator."""

    def network(self) -> nn.Module:
        """A new one, from torch's global generator."""
        ...

    def training(self, seed: int) -> tuple[Tensor, ...]:
        """The training data of the run with this seed: tensors (K, ...) of K samples."""
        ...

    def loss(self, network: Any, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
        """One number with its graph, a mean over the samples of the batch; noise is drawn from ``generator``."""
        ...

    def score(self, network: Any, part: Part) -> Tensor:
        """One number on validation or test data: larger is better, 100 is the best; it may be below 0 or NaN."""
        ...


def r_squared(outputs: Tensor, targets: Tensor) -> Tensor:
    """100 * (1 - squared error / variance of the targets), all columns together: (K, m), (K, m) -> one number."""
    error = (outputs - targets).double().square().sum()
    return 100 * (1 - error / (targets - targets.mean(0)).double().square().sum())
