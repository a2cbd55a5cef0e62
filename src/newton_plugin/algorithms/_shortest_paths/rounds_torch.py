"""Exact shortest paths by whole-tensor operations: for devices other than the CPU, and without numba.

Bellman-Ford without edges: ``D <- min(D, c + smallest D around)`` until nothing changes. After k rounds D is right
where the shortest path has at most k steps, so the number of rounds is the number of steps of the longest shortest path
to *any* vertex: little more than max(h, w) on maps, up to half of all vertices in a maze. Every eighth round the host
asks whether anything changed. On a GPU that is a synchronisation; only a fixed number of rounds could avoid it.

The minima are over the same float64 sums as in Dijkstra's algorithm. Rounding is monotone, so the order of the
comparisons does not matter and the bits are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin.algorithms._log_domain import wide
from newton_plugin.algorithms._shortest_paths.cheapest import check_costs
from newton_plugin.algorithms._shortest_paths.grid import neighbours, smallest_around

__all__ = ["ROUNDS", "solve_grid"]

ROUNDS = 8  # before the host asks whether anything changed


def solve_grid(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (B) and paths (B, h, w) of ``costs`` (B, h, w)."""
    c = wide(costs)
    check_costs("costs", c)
    d = _distances(c)
    return d[:, -2, -2], _trace(_steps_back(d), *c.shape[1:])


def _distances(c: Tensor) -> Tensor:
    """D of every vertex, in a frame of infinities: (B, h + 2, w + 2)."""
    batch, h, w = c.shape
    d = c.new_full((batch, h + 2, w + 2), torch.inf)
    inner = d[:, 1:-1, 1:-1]
    inner[:, 0, 0] = c[:, 0, 0]
    rounds = max(h, w) - 1
    while True:
        for _ in range(rounds):
            torch.minimum(inner, c + smallest_around(d), out=inner)
        new = torch.minimum(inner, c + smallest_around(d))
        if torch.equal(new, inner):
            return d
        inner.copy_(new)
        rounds = ROUNDS - 1


def _steps_back(d: Tensor) -> Tensor:
    """For every vertex, which of its neighbours comes before it by the tie rule: (B, h, w), 0 to 7, row-major."""
    near = neighbours(d)
    if bool(((near == near.amin(0)).sum(0) > 1).any()):
        near = neighbours(_tie_breaking_keys(d))
    return near.argmin(0)  # the first of equal ones


def _tie_breaking_keys(d: Tensor) -> Tensor:
    """Integers ordered as (D, vertices on the way), framed like ``d``: rank of D among all D, times n, plus count.

    The counts come from the iteration that gave D: one more than that of the neighbour with the smallest key.
    """
    n = d.shape[-1] * d.shape[-2]
    ordered, order = d.flatten(1).sort(-1)
    grows = torch.nn.functional.pad(ordered[:, 1:] > ordered[:, :-1], (1, 0))
    rank = torch.empty_like(order).scatter_(1, order, grows.cumsum(-1)).view_as(d)
    key = rank * n + n - 1
    inner, base = key[:, 1:-1, 1:-1], rank[:, 1:-1, 1:-1] * n
    inner[:, 0, 0] = base[:, 0, 0]
    before = None
    while before is None or not torch.equal(before, inner):
        before = inner.clone()
        for _ in range(ROUNDS):
            count = (smallest_around(key) % n + 1).clamp_(max=n - 1)
            torch.minimum(inner, base + count, out=inner)
    return key


def _trace(step: Tensor, h: int, w: int) -> Tensor:
    """Follow the steps from the last vertex to the first: the indicator (B, h, w)."""
    offset = torch.tensor([-w - 1, -w, -w + 1, -1, 1, w - 1, w, w + 1], device=step.device)
    here = torch.arange(h * w, device=step.device)
    before = here + offset[step.flatten(1)]
    before[:, 0] = 0
    path = step.new_zeros((len(step), h * w), dtype=torch.uint8)
    at = here[-1:].expand(len(step), 1)
    path.scatter_(1, at, 1)
    while bool((at > 0).any()):
        for _ in range(ROUNDS):
            at = before.gather(1, at)
            path.scatter_(1, at, 1)
    return path.unflatten(1, (h, w))
