"""To which sample each position of the last layer belongs.

The gradients of the outputs are rows (N, m). On the way down to the last layer they change their places. Two ways to
see where they go: the strides of the rows, where all of that are views; or numbers, pushed through the same nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from newton_plugin._boundary.rows import RowLayout

__all__ = ["MOST_NUMBERS", "Move", "Places", "find_places"]

MOST_NUMBERS = 2**24
_SEVERAL = "a position of the last layer belongs to several samples"

# What happens to the gradients: an operation on them, or the dimension along which entries of one sample are mixed.
Move = Callable[[Tensor], Tensor] | int


class Places(NamedTuple):
    """Where the gradients (N, P, k) at the last layer's outputs are.

    Attributes:
        positions: P, of each sample.
        order: N * P positions of the layer, those of the first sample first; None: they are in order, and all of them.
        view: sizes (N, ..., k) and strides of these gradients inside of the rows (N, m); None: the rows do not hold
            them all, or in no such order.
    """

    positions: int
    order: Tensor | None
    view: tuple[tuple[int, ...], tuple[int, ...]] | None


_known: dict[Hashable, Places | str] = {}


def find_places(
    layout: RowLayout,
    moves: Sequence[Move],
    by_position: Callable[[Tensor], Tensor],
    device: torch.device,
    key: Hashable,
) -> Places | str:
    """The places of the gradients; a string, why samples have no positions of their own.

    Args:
        layout: of the outputs.
        moves: what happens to the gradients on their way to the layer, in order.
        by_position: from the gradients at the layer's outputs to (positions..., k).
        device: where ``order`` is wanted.
        key: tells the arguments from others; an answer is found once and remembered.
    """
    places = _known.get(key)
    if places is None:
        with torch.no_grad(), torch.device("cpu"):
            places = _by_strides(layout, moves, by_position) or _by_numbers(layout, moves, by_position)
        if isinstance(places, Places) and places.order is not None:
            places = places._replace(order=places.order.to(device))
        while len(_known) >= 64:
            _known.pop(next(iter(_known)), None)
        _known[key] = places
    return places


def _by_strides(
    layout: RowLayout, moves: Sequence[Move], by_position: Callable[[Tensor], Tensor]
) -> Places | str | None:
    """The places where every move is a view, whatever the size; None: one is not."""
    n, m = layout.rows, layout.features
    rows = torch.empty(n, m, device="meta")
    current = layout.from_rows(rows)
    for move in moves:
        if isinstance(move, int):
            return None
        current = move(current)
    current = by_position(current)
    if current._base is not rows or current.numel() != n * m:
        return None
    *dims, (k, step) = zip(current.shape, current.stride(), strict=True)
    parts: list[tuple[int, int]] = []  # of dimensions: none goes through samples and inside of them
    for size, stride in dims:
        if stride < m and size * stride > m:
            inside = m // stride
            if m % stride or size % inside:
                return _SEVERAL
            parts += [(size // inside, m), (inside, stride)]
        elif size > 1:
            parts.append((size, stride))
    within = [part for part in parts if part[1] < m]
    if sum((size - 1) * stride for size, stride in [*within, (k, step)]) >= m:
        return _SEVERAL
    axes = sorted(range(len(parts)), key=lambda axis: -parts[axis][1])
    order = None
    if axes != sorted(axes):
        numbers = torch.arange(n * m // k).reshape([size for size, _ in parts])
        order = numbers.permute(axes).reshape(-1)
    within.sort(key=lambda part: -part[1])
    sizes, strides = zip((n, m), *within, (k, step), strict=True)
    return Places(math.prod(sizes[1:-1]), order, (sizes, strides))


def _by_numbers(layout: RowLayout, moves: Sequence[Move], by_position: Callable[[Tensor], Tensor]) -> Places | str:
    """The places of numbers: 1 to N * m, row by row, exact in float64. Where the layer has others, they are 0."""
    n, m = layout.rows, layout.features
    if n * m > MOST_NUMBERS:
        return f"more than {MOST_NUMBERS} outputs change their places in a way that no strides tell"
    current = layout.from_rows(torch.arange(1, n * m + 1, dtype=torch.float64).view(n, m))
    for move in moves:
        if not isinstance(move, int):
            current = move(current)
            continue
        # What is mixed reaches entries that the outputs leave out, too.
        current = torch.where(current > 0, current, current.amax(move, keepdim=True))
        samples = ((current - 1) / m).floor()
        if bool((samples != samples.narrow(move, 0, 1)).any()):
            return "an operation between the last layer and the outputs mixes samples"
    current = by_position(current).long()
    if current.numel() > MOST_NUMBERS:
        return f"the last layer has more than {MOST_NUMBERS} outputs, and not all are used"
    current = current.reshape(-1, current.shape[-1]) - 1  # -1: no entry of the rows
    last = current.amax(1)
    samples = last.div(m, rounding_mode="floor")
    if bool(((current.div(m, rounding_mode="floor") != samples[:, None]) & (current >= 0)).any()):
        return _SEVERAL
    order = last.argsort(stable=True)[int((last < 0).sum()) :]
    counts = samples[order].bincount(minlength=n)
    if bool((counts != counts[0]).any()):
        return "samples have different numbers of positions at the last layer"
    ordered = current[order].view(n, len(order) // n, -1)
    in_order = len(order) == len(last) and torch.equal(order, torch.arange(len(order)))
    return Places(ordered.shape[1], None if in_order else order, _view_of(ordered))


def _view_of(places: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Sizes and strides of ``places`` (N, P, k), where they are 0 at first and rise evenly along each dimension."""
    even = torch.zeros((), dtype=places.dtype)
    strides = []
    for dim, size in enumerate(places.shape):
        step = int(places.select(dim, 1).flatten()[0]) if size > 1 else 1
        strides.append(step)
        even = even.unsqueeze(-1) + step * torch.arange(size)
    if min(strides) < 1 or not torch.equal(even, places):
        return None
    return tuple(places.shape), tuple(strides)
