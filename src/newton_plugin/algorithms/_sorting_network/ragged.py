"""Where the lists of different lengths in one batch lie in the sorting network of the longest.

The network of m wires is contained in that of n > m, so a list is sorted as if it had not been padded:

* odd-even: it is the first m layers on the first m wires;
* bitonic: with b the least such that ``2^b >= m``, it is the layers of the first b blocks on the first ``2^b`` wires.
  There the first ``2^b - m`` wires rest, as they do in the network of m; so the list begins behind them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from newton_plugin.algorithms._sorting_network.layers import Layer

__all__ = ["BitonicLists", "Lists", "OddEvenLists"]


class Lists(Protocol):
    """Lists of different length in one network; states are (wires, k, lists)."""

    def enter(self, state: Tensor) -> Tensor:
        """Move every list from behind the resting wires of the whole network to the wires of its own network."""
        ...

    def slope(self, layer: Layer, depth: int, slope: float | Tensor) -> float | Tensor:
        """The layer's slope with the signs of the directions, also for pairs that rest in the whole network."""
        ...

    def active(self, layer: Layer, depth: int) -> Tensor:
        """Which pairs belong to each list's own network: (blocks, step, 1, lists)."""
        ...

    def leave(self, state: Tensor) -> Tensor:
        """The inverse of :meth:`enter`."""
        ...

    def leave_adjoint(self, state: Tensor) -> Tensor:
        """The adjoint of :meth:`leave`: :meth:`enter`, with 0 on wires that hold no element of the list."""
        ...


class OddEvenLists:
    """Lists in an odd-even network: each is on the first wires already."""

    def __init__(self, lengths: Tensor) -> None:
        self._lengths = lengths

    def enter(self, state: Tensor) -> Tensor:
        return state

    def slope(self, layer: Layer, depth: int, slope: float | Tensor) -> float | Tensor:
        return slope

    def active(self, layer: Layer, depth: int) -> Tensor:
        second = torch.arange(layer.pairs, device=self._lengths.device).view(-1, 1, 1, 1) * 2 + layer.offset + 1
        return (second < self._lengths) & (depth < self._lengths)

    def leave(self, state: Tensor) -> Tensor:
        return state

    def leave_adjoint(self, state: Tensor) -> Tensor:
        return state


class BitonicLists:
    """Lists in a bitonic network: each begins behind the resting wires of its own blocks.

    Args:
        lengths: (lists,).
        wires: of the whole network, a power of two.
        resting: how many of them rest, before the others.
        steepness: of the swaps.
    """

    def __init__(self, lengths: Tensor, wires: int, resting: int, steepness: float) -> None:
        count = (wires - 1).bit_length()
        powers = 2 ** torch.arange(count + 1, device=lengths.device)
        self._blocks = (powers.unsqueeze(-1) < lengths).sum(0)  # b: the least with 2^b >= m
        self._end = powers[self._blocks]
        self._start = self._end - lengths
        self._block_of = [block for block in range(count) for _ in range(block + 1)]
        self._wire = torch.arange(wires, device=lengths.device).unsqueeze(-1)
        self._resting, self._steepness = resting, steepness

    def enter(self, state: Tensor) -> Tensor:
        return self._moved(state, self._wire - self._start + self._resting)

    def leave(self, state: Tensor) -> Tensor:
        return self._moved(state, self._wire - self._resting + self._start)

    def leave_adjoint(self, state: Tensor) -> Tensor:
        inside = (self._wire >= self._start) & (self._wire < self._end)
        return self.enter(state) * inside.unsqueeze(1)

    def _moved(self, state: Tensor, source: Tensor) -> Tensor:
        # Clamping only affects wires that no active pair touches, or that are dropped in the end.
        index = source.clamp(0, state.shape[0] - 1).unsqueeze(1).expand(-1, state.shape[1], -1)
        return state.gather(0, index)

    def _first(self, layer: Layer) -> Tensor:
        pair = torch.arange(layer.pairs, device=self._wire.device)
        return (pair // layer.step * 2 * layer.step + pair % layer.step).view(-1, layer.step, 1, 1)

    def slope(self, layer: Layer, depth: int, slope: float | Tensor) -> float | Tensor:
        down = (self._first(layer) & (2 << self._block_of[depth])) > 0
        return torch.where(down, self._steepness, -self._steepness)

    def active(self, layer: Layer, depth: int) -> Tensor:
        first = self._first(layer)
        inside = (first >= self._start) & (first + layer.step < self._end)
        return inside & (self._block_of[depth] < self._blocks)
