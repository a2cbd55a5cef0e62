"""What a problem is: a loss, its data, a network, and how an output is judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Protocol

from benchmarks.evidence.data.images import Part
from torch import Tensor, nn

__all__ = ["LEFT_OUT_OF_OTHER_IMAGES", "Batches", "Problem", "RowsLoss"]

LEFT_OUT_OF_OTHER_IMAGES = ("short memory", "Fisher, fixed", "Hessian", "Hessian, fixed", "Hessian per sample")
"""Arms of the table ``more`` that are run on scikit-learn's digits only (protocol, amendment 11)."""

Batches = Iterator[tuple[Tensor, Tensor]]
RowsLoss = Callable[[Tensor, Tensor], Tensor]
"""Outputs (M, ...) and targets (M, ...) to one loss for each row, (M,)."""


class Problem(Protocol):
    """A loss to train on. Every batch of every replica is made from its seed alone.

    Attributes:
        name, title: for lines and for tables.
        table: the group of problems that is corrected together, and the name of its file of lines.
        batch, steps: of a training.
        sharpnesses: that the baseline chooses from; empty if the loss has none.
        optimizer: "adam" or "sgd".
        without: arms that are left out, for their cost.
    """

    name: str
    title: str
    table: str
    batch: int
    steps: int
    sharpnesses: tuple[float, ...]
    optimizer: Literal["adam", "sgd"]
    without: tuple[str, ...]

    def network(self) -> nn.Module:
        """A new one, from torch's global generator."""
        ...

    def batches(self, seeds: Sequence[int], batch: int, steps: int) -> Batches:
        """(inputs (S, B, ...), targets (S, B, ...)) for S seeds."""
        ...

    def held_out(self, part: Part) -> tuple[Tensor, Tensor]:
        """Fixed inputs (E, ...) and targets (E, ...)."""
        ...

    def loss(self, sharpness: float | None, seeds: Sequence[int], textbook: bool) -> RowsLoss:
        """The loss of rows that belong to the replicas with these seeds, in their order and of equal number.

        Args:
            sharpness: of the loss; None if it has none.
            seeds: of the replicas, for losses that draw noise.
            textbook: as one writes it down first, if that is something else.
        """
        ...

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How good each row (..., E, ...) is, (..., E); its mean times 100 is what tables show."""
        ...
