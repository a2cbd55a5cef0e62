"""Work on a batch of lists in chunks: a chunk fits in the cache, and memory stays bounded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from newton_plugin.algorithms._list_loss.function import ListDerivatives

__all__ = ["InChunks", "chunk_of"]

# Elements of a chunk: on the CPU what a cache holds, on other devices what keeps them busy.
_CHUNK = {"cpu": 2**17}
_CHUNK_ELSEWHERE = 2**24


class InChunks:
    """Loss, gradient and Hessian of all lists of a batch, chunk by chunk.

    Args:
        part: computes the :class:`ListDerivatives` of a slice of the lists.
        count: number of lists.
        chunk: number of lists in a chunk.
        keep: whether the results of all chunks are kept for the Hessian. If not, a single chunk's are kept, and those
            of several chunks are computed again.
    """

    def __init__(self, part: Callable[[slice], ListDerivatives], count: int, chunk: int, keep: bool) -> None:
        self._part = part
        self._slices = [slice(i, i + chunk) for i in range(0, max(count, 1), chunk)]
        self._kept: list[ListDerivatives] = []
        results = []
        for lists in self._slices:
            done = part(lists)
            results.append((done.loss, done.gradient))
            if keep or len(self._slices) == 1:
                self._kept.append(done)
        losses, gradients = zip(*results, strict=True)
        self.loss, self.gradient = torch.cat(losses), torch.cat(gradients)

    def hessian(self) -> Tensor:
        """(N, n, n), exactly symmetric."""
        parts = self._kept or map(self._part, self._slices)
        return torch.cat([part.hessian() for part in parts])


def chunk_of(like: Tensor, elements: int) -> int:
    """How many lists make a chunk if each has so many ``elements``, on the device of ``like``."""
    return max(1, _CHUNK.get(like.device.type, _CHUNK_ELSEWHERE) // max(1, elements))
