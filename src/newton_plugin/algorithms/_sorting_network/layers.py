"""Which wires meet in which layer of a sorting network.

A sorting network compares fixed pairs of wires in a fixed order, so its whole schedule is known without the data.
Comparators that share no wire run side by side and form one layer:

* odd-even transposition sort: n layers; neighbours (0,1), (2,3), ... and (1,2), (3,4), ... in turn;
* bitonic sort: about log2(n)^2/2 layers; sort one half up and the other down, then merge. For n that is not a
  power of two, the network of the next one is built and its first wires rest.

In both, the partners in a layer are a constant ``step`` apart, so all pairs of a layer are two slices of a
reshaped view: ``wires -> (blocks, 2, step)``, after ``offset`` wires at the start that rest. Nothing is
gathered. Wires are the first dimension of a state: the entries of one wire lie together in memory, so that joining
the slices again copies long runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "Layer", "join", "schedule", "split"]

LAYOUTS = ("odd_even", "bitonic")


class Layer(NamedTuple):
    """One layer: the wires offset ... offset + 2 * pairs - 1, in blocks of two runs of ``step`` wires."""

    offset: int
    step: int
    pairs: int
    # per pair 1: the smaller goes to the first wire, -1: to the second, 0: the pair rests
    direction: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """How many blocks; where there are no lists, a view cannot infer it."""
        return self.pairs // self.step

    def wires(self) -> list[tuple[int, int, int]]:
        """(first wire, second wire, direction) of each pair."""
        first = [self.offset + p // self.step * 2 * self.step + p % self.step for p in range(self.pairs)]
        return [(a, a + self.step, d) for a, d in zip(first, self.direction, strict=True)]


def schedule(n: int, layout: str) -> tuple[int, list[Layer]]:
    """``(resting, layers)``: the network has ``resting`` unused wires, before the n real ones.

    >>> resting, layers = schedule(4, "odd_even")
    >>> [[(a, b) for a, b, _ in layer.wires()] for layer in layers]
    [[(0, 1), (2, 3)], [(1, 2)], [(0, 1), (2, 3)], [(1, 2)]]
    >>> schedule(4, "bitonic")[1][0].wires(), schedule(3, "bitonic")[0]
    ([(0, 1, 1), (2, 3, -1)], 1)
    """
    if n == 1:
        return 0, []
    if layout == "odd_even":
        counts = [(depth % 2, (n - depth % 2) // 2) for depth in range(n)]
        return 0, [Layer(offset, 1, pairs, (1,) * pairs) for offset, pairs in counts if pairs]
    blocks = (n - 1).bit_length()
    resting = (1 << blocks) - n
    layers = []
    for block in range(blocks):
        for step in (1 << k for k in range(block, -1, -1)):
            firsts = [a for a in range(1 << blocks) if not a & step]
            down = 2 << block  # runs of this many wires go up and down in turn
            direction = tuple(0 if a < resting else -1 if a & down else 1 for a in firsts)
            layers.append(Layer(0, step, len(firsts), direction))
    return resting, layers


def split(state: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
    """The first and the second wires of all pairs: (wires, ...) -> two views (blocks, step, ...)."""
    if 2 * layer.pairs < state.shape[0]:
        state = state.narrow(0, layer.offset, 2 * layer.pairs)
    first, second = state.unflatten(0, (-1, 2, layer.step)).unbind(1)
    return first, second


def join(first: Tensor, second: Tensor, state: Tensor, layer: Layer) -> Tensor:
    """``state`` with its pairs replaced: the inverse of ``split``."""
    pairs = torch.stack((first, second), 1).flatten(0, 2)
    end = layer.offset + 2 * layer.pairs
    rest = state.shape[0] - end
    if layer.offset == 0 and rest == 0:
        return pairs
    return torch.cat((state.narrow(0, 0, layer.offset), pairs, state.narrow(0, end, rest)))
