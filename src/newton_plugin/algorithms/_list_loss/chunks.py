"""A batch of lists, so many at a time: what is worked on stays in the cache, and memory bounded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from newton_plugin._errors import ShapeError, check_floating
from newton_plugin.algorithms._list_loss.function import ListDerivatives

__all__ = ["InChunks", "chunk_of"]

# Elements that are worked on at once: what a cache holds; on a device, what keeps it busy.
_CHUNK = {"cpu": 2**17}
_CHUNK_ELSEWHERE = 2**24


class InChunks:
    """Loss, gradient and Hessian of all lists of a batch, so many at a time.

    Args:
        part: from some of the lists to their loss and gradient, and to what gives their Hessians.
        count: of lists.
        chunk: of them at once.
        keep: what the Hessian needs, for all parts; else for one alone, and several are computed once more.
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
    """How many lists of so many elements each are worked on at once."""
    return max(1, _CHUNK.get(like.device.type, _CHUNK_ELSEWHERE) // max(1, elements))


def check_scores(scores: Tensor) -> None:
    """Raise unless ``scores`` is a floating-point tensor of shape (..., n), n >= 1."""
    check_floating("scores", scores)
    if scores.ndim == 0 or scores.shape[-1] == 0:
        raise ShapeError(
            f"scores must have shape (..., n) with n >= 1; got {tuple(scores.shape)}. "
            "Put the list in the last dimension."
        )
