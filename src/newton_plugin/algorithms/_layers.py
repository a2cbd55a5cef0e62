"""Which wires meet in which layer of a sorting network.

A sorting network compares fixed pairs of wires in a fixed order, whatever the data, so the whole schedule is
known beforehand. Comparators that share no wire run side by side and form one layer:

* odd-even transposition sort: n layers; neighbours (0,1), (2,3), ... and (1,2), (3,4), ... in turn;
* bitonic sort: about log2(n)^2/2 layers; sort one half up and the other down, then merge. For n that is not a
  power of two, the network of the next one is built and its first wires are left out with their comparators.

To apply a layer as one batched product of 2x2 matrices, the two wires of a pair must lie side by side. Each
layer therefore carries the order in which it wants the wires, relative to the order in which the layer before
left them; wires that rest in this layer are put into pairs of their own, marked as inactive. An odd n gets
one more wire that always rests.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["LAYOUTS", "Layer", "comparators", "schedule"]

LAYOUTS = ("odd_even", "bitonic")


class Layer(NamedTuple):
    """One layer: gather the wires, then compare positions (0, 1), (2, 3), ..."""

    gather: tuple[int, ...]  # new position -> position in the order of the layer before
    active: tuple[bool, ...]  # one per pair
    depth: int  # number of the layer


def comparators(n: int, layout: str) -> list[list[tuple[int, int]]]:
    """The layers as pairs (wire of the smaller, wire of the larger).

    >>> comparators(4, "odd_even")
    [[(0, 1), (2, 3)], [(1, 2)], [(0, 1), (2, 3)], [(1, 2)]]
    >>> comparators(4, "bitonic")
    [[(0, 1), (3, 2)], [(0, 2), (1, 3)], [(0, 1), (2, 3)]]
    """
    if layout == "odd_even":
        return [[(i, i + 1) for i in range(depth % 2, n - 1, 2)] for depth in range(n)] if n > 1 else []
    blocks = (n - 1).bit_length()
    missing = (1 << blocks) - n
    layers = []
    for block in range(blocks):
        for step in (1 << k for k in range(block, -1, -1)):
            low = [a for a in range(missing, n + missing - step) if not a & step]
            down = 2 << block  # blocks of this many wires go up and down in turn
            pairs = [(a, a + step) if not a & down else (a + step, a) for a in low]
            layers.append([(a - missing, b - missing) for a, b in pairs])
    return layers


def schedule(n: int, layout: str) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
    """The layers of a network of n wires, and the gather that puts the wires back in order at the end."""
    wires = n + n % 2
    order = list(range(wires))
    layers = []
    for depth, pairs in enumerate(comparators(n, layout)):
        used = {wire for pair in pairs for wire in pair}
        rest = [wire for wire in range(wires) if wire not in used]
        flat = [wire for pair in sorted(pairs, key=min) for wire in pair]
        # Either order of the resting wires will do; the one that makes the gather a rotation is cheaper.
        wanted = min((flat + rest, flat + rest[::-1]), key=lambda new: not _rotation(_relative(order, new)))
        active = tuple(k < len(pairs) for k in range(wires // 2))
        layers.append(Layer(_relative(order, wanted), active, depth))
        order = wanted
    return tuple(layers), _relative(order, list(range(wires)))


def _relative(old: list[int], new: list[int]) -> tuple[int, ...]:
    place = {wire: k for k, wire in enumerate(old)}
    return tuple(place[wire] for wire in new)


def _rotation(gather: tuple[int, ...]) -> bool:
    n = len(gather)
    return all((gather[k] - gather[0] - k) % n == 0 for k in range(n))
