"""Numbers in images of real digits, drawn with replacement: for losses that use the numbers, not only their order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from benchmarks.evidence.data.images import Part, digit_images
from torch import Tensor

__all__ = ["write_numbers"]


def write_numbers(
    part: Part, shape: Sequence[int], digits: int, generator: torch.Generator, folder: str | None = None
) -> tuple[Tensor, Tensor]:
    """Images (*shape, h, w * digits) and the numbers (*shape) that they show; leading zeros are written.

    Every digit is an image of its own, drawn uniformly from the part's, the same for the same generator.
    """
    images, labels = digit_images(part, folder)
    index = torch.randint(len(labels), (*shape, digits), generator=generator)
    powers = 10 ** torch.arange(digits - 1, -1, -1)
    return images[index].movedim(-3, -2).flatten(-2), (labels[index] * powers).sum(-1)
