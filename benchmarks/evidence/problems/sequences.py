"""Reading: several real digits side by side, labels without alignment, connectionist temporal classification (CTC)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from benchmarks.evidence.data.images import Part, digit_images
from benchmarks.evidence.problems.problem import Batches, RowsLoss
from torch import Tensor, nn

__all__ = ["BLANK", "Sequences", "greedy_decode"]

BLANK, CLASSES = 0, 11  # classes 1 to 10 are the digits 0 to 9


@dataclass(frozen=True)
class Sequences:
    """Lines of ``length`` digits with gaps of random width between them.

    Attributes:
        folder: with MNIST; None: scikit-learn's digits.
        without: torch's CTC has no second derivative; nobody writes it any other way.
    """

    name: str
    title: str
    length: int = 4
    table: str = "beyond"
    steps: int = 500
    batch: int = 32
    folder: str | None = None
    sharpnesses: tuple[float, ...] = ()
    optimizer: Literal["adam", "sgd"] = "adam"
    without: tuple[str, ...] = ("plain, textbook", "Hessian", "Hessian, fixed", "Hessian per sample")

    def network(self) -> nn.Module:
        side = 8 if self.folder is None else 28
        layers = [nn.Linear(side * side, 48), nn.ReLU(), nn.Linear(48, CLASSES)]
        return nn.Sequential(_Windows(side), *layers)

    def batches(self, seeds: Sequence[int], batch: int, steps: int) -> Batches:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for _ in range(steps):
            drawn = [_lines("train", batch, self.length, g, self.folder) for g in generators]
            yield torch.stack([lines for lines, _ in drawn]), torch.stack([labels for _, labels in drawn])

    def held_out(self, part: Part) -> tuple[Tensor, Tensor]:
        return _held_out(part, self.length, self.folder)

    def loss(self, sharpness: float | None, seeds: Sequence[int], textbook: bool) -> RowsLoss:
        return _ctc

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (greedy_decode(outputs, self.length) == targets).all(-1).double()


def _ctc(outputs: Tensor, targets: Tensor) -> Tensor:
    """Outputs (M, T, classes), targets (M, length) -> (M,)."""
    count, times = outputs.shape[:2]
    return nn.functional.ctc_loss(
        outputs.log_softmax(-1).movedim(1, 0),
        targets,
        torch.full((count,), times),
        torch.full((count,), targets.shape[-1]),
        blank=BLANK,
        reduction="none",
    )


def greedy_decode(outputs: Tensor, length: int) -> Tensor:
    """The likeliest class of each window, repetitions merged, blanks dropped: (..., T, classes) -> (..., length).

    A line that reads as more or fewer than ``length`` labels is all -1, which no label is.
    """
    best = outputs.argmax(-1)
    before = nn.functional.pad(best[..., :-1], (1, 0), value=BLANK)
    kept = (best != before) & (best != BLANK)
    place = torch.where(kept, kept.cumsum(-1) - 1, length).clamp_max(length)  # what is too much falls off the end
    read = torch.zeros(*best.shape[:-1], length + 1, dtype=best.dtype).scatter_(-1, place, best)[..., :length]
    return torch.where(kept.sum(-1, keepdim=True) == length, read, -1)


class _Windows(nn.Module):
    """Lines (..., h, w) as their windows of ``side`` columns, a quarter of that apart: (..., T, h * side)."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, lines: Tensor) -> Tensor:
        return lines.unfold(-1, self.side, self.side // 4).movedim(-2, -3).flatten(-2)


def _lines(
    part: Part, count: int, length: int, generator: torch.Generator, folder: str | None
) -> tuple[Tensor, Tensor]:
    """Lines (count, h, w) and labels (count, length); before each digit a gap of up to three eighths of its width."""
    images, labels = digit_images(part, folder)
    index = torch.randint(len(labels), (count, length), generator=generator)
    side = images.shape[-1]
    widest = 3 * side // 8
    gaps = torch.randint(widest + 1, (count, length), generator=generator)
    start = gaps.cumsum(-1) + side * torch.arange(length)
    columns = (start.unsqueeze(-1) + torch.arange(side)).flatten(1)  # (count, length * side)
    written = images[index].movedim(-2, 1).flatten(-2)  # (count, h, length * side)
    paper = images.min().expand(count, side, length * (side + widest)).clone()
    return paper.scatter_(-1, columns.unsqueeze(1).expand_as(written), written), labels[index] + 1


@cache
def _held_out(part: Part, length: int, folder: str | None) -> tuple[Tensor, Tensor]:
    seed = {"validation": 1, "test": 2}[part]
    return _lines(part, 500, length, torch.Generator().manual_seed(seed), folder)
