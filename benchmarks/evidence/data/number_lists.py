"""Lists of different numbers, written in images of real digits, with their order."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from benchmarks.evidence.data.images import Images, Part, digit_images
from torch import Tensor

__all__ = ["NumberLists"]

_AT_ONCE = 50  # steps whose lists are drawn together


class NumberLists:
    """Batches (images (B, n, h, w * digits), ranks (B, n), 0 = smallest).

    Args:
        part, folder: of the images.
        n: length of the lists.
        digits: of a number; leading zeros are written.
        device: where the images are; what is drawn is the same on every device.
    """

    def __init__(self, part: Part, n: int, digits: int, folder: str | None = None, device: str = "cpu") -> None:
        self.n, self.digits, self.device = n, digits, device
        self.images, self.start, self.count = _by_digit(part, folder, device)

    def draw(self, batches: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """``batches`` batches of ``size`` lists; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        for first in range(0, batches, _AT_ONCE):
            k = min(_AT_ONCE, batches - first)
            numbers = different(k * size, self.n, 10**self.digits, generator)
            powers = 10 ** torch.arange(self.digits - 1, -1, -1)
            written = numbers.unsqueeze(-1) // powers % 10  # (K, n, digits)
            which = torch.rand(written.shape, generator=generator)
            index = self.start[written] + (which * self.count[written]).long()
            ranks = numbers.argsort(-1).argsort(-1)
            for i, r in zip(index.split(size), ranks.split(size), strict=True):
                yield self.images[i.to(self.device)].movedim(-3, -2).flatten(-2), r


def different(count: int, n: int, below: int, generator: torch.Generator) -> Tensor:
    """(count, n) integers in [0, below), uniform over the rows without repetition, in random order."""
    if below <= 100:
        return torch.rand(count, below, generator=generator).argsort(-1)[:, :n]
    numbers = torch.randint(below, (count, n), generator=generator)
    while True:
        ordered = numbers.sort(-1).values
        again = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
        if not again.any():
            return numbers
        numbers[again] = torch.randint(below, (int(again.sum()), n), generator=generator)


@cache
def _by_digit(part: Part, folder: str | None, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Images sorted by their digit; where a digit's images start, and how many there are."""
    data: Images = digit_images(part, folder)
    count = data.labels.bincount(minlength=10)
    return data.images[data.labels.argsort(stable=True)].to(device), count.cumsum(0) - count, count
