"""Lists of n images of n different handwritten digits with their order, whole batches by index arithmetic."""

from collections.abc import Iterator
from typing import Literal

import torch
from sklearn.datasets import load_digits
from torch import Tensor

Part = Literal["train", "validation", "test"]

# scikit-learn's 1797 real digits, shuffled once for everybody: no image is in two parts.
PARTS: dict[Part, slice] = {
    "train": slice(0, 1000),
    "validation": slice(1000, 1300),
    "test": slice(1300, None),
}


def digit_images(part: Part) -> tuple[Tensor, Tensor]:
    """Images (K, 64) and their digits (K,); pixels have mean 0 and deviation 1 over the training images."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(digits.data, dtype=torch.float32)[order], torch.tensor(digits.target)[order]
    train = images[PARTS["train"]]
    return ((images - train.mean()) / train.std())[PARTS[part]], labels[PARTS[part]]


class DigitLists:
    """Batches (images (B, n, 64), ranks (B, n) with 0 = smallest), an iterable like a DataLoader.

    Drawn anew in every pass, or the same in all of them (``fixed=True``).
    """

    def __init__(self, part: Part, n: int, batch_size: int, batches: int, seed: int, fixed: bool = False) -> None:
        self.images, labels = digit_images(part)
        self.by_digit = labels.argsort(stable=True)  # images grouped by digit:
        self.count = labels.bincount(minlength=10)  # so many of digit d,
        self.start = self.count.cumsum(0) - self.count  # the first of them here
        self.n, self.batch_size, self.batches, self.seed, self.fixed = n, batch_size, batches, seed, fixed
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.fixed:
            self.generator.manual_seed(self.seed)
        drawn = torch.rand(2, self.batches * self.batch_size, 10, generator=self.generator)
        digits = drawn[0].argsort(-1)[:, : self.n]  # n different ones in random order
        which = (drawn[1][:, : self.n] * self.count[digits]).long()
        index = self.by_digit[self.start[digits] + which]
        ranks = digits.argsort(-1).argsort(-1)
        for i, r in zip(index.split(self.batch_size), ranks.split(self.batch_size), strict=True):
            yield self.images[i], r
