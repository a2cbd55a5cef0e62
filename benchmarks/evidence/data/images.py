"""Real handwritten digits: scikit-learn's 8 x 8 ones, or MNIST's IDX files from a folder."""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

__all__ = ["Images", "Part", "digit_images"]

Part = Literal["train", "validation", "test"]


class Images(NamedTuple):
    """images (K, h, w), mean 0 and deviation 1 over the training images; labels (K,), 0 to 9."""

    images: Tensor
    labels: Tensor


@cache
def digit_images(part: Part, folder: str | None = None) -> Images:
    """The images of a part; shuffled once, by seed 0, so that no image is in two parts.

    Args:
        part: of scikit-learn's 1797 digits 1000, 300 and 497; of a folder's 70, 10 and 20 per cent.
        folder: with IDX files ``*images-idx3-ubyte[.gz]`` and ``*labels-idx1-ubyte[.gz]``; None: scikit-learn's.
    """
    images, labels = _sklearn() if folder is None else _idx(Path(folder))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    first, second = (1000, 1300) if folder is None else (7 * len(labels) // 10, 8 * len(labels) // 10)
    mean, deviation = images[:first].mean(), images[:first].std()
    chosen = {"train": slice(0, first), "validation": slice(first, second), "test": slice(second, None)}[part]
    return Images((images[chosen] - mean) / deviation, labels[chosen])


def _sklearn() -> Images:
    digits = load_digits()
    return Images(torch.tensor(digits.images, dtype=torch.float32), torch.tensor(digits.target))


def _idx(folder: Path) -> Images:
    images, labels = (
        [_array(path) for path in sorted(folder.glob(pattern))] for pattern in ("*images-idx3*", "*labels-idx1*")
    )
    if not images or len(images) != len(labels):
        raise FileNotFoundError(
            f"{folder} holds {len(images)} files *images-idx3-ubyte and {len(labels)} files *labels-idx1-ubyte; "
            "wanted is one pair or more (MNIST, gzipped or not)."
        )
    return Images(torch.from_numpy(np.concatenate(images)).float(), torch.from_numpy(np.concatenate(labels)).long())


def _array(path: Path) -> np.ndarray:
    """IDX: two zero bytes, a type (8: bytes), the number of dimensions, their sizes (big-endian), the bytes."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no IDX file of bytes.")
    sizes = np.frombuffer(data, ">i4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes).copy()
