"""Dijkstra's algorithm compiled by numba; it runs without the GIL, and large batches are split over threads.

This module is imported at the first call that needs it. Compiling takes some seconds, once: numba keeps the machine
code beside this file (or, where that folder cannot be written, in the user's cache folder) and later processes load it.

Threads are started for a batch that is large enough, and end with it. They are plain Python threads, and not numba's
parallel loops: those run on OpenMP or on a pool, which does not survive the fork by which a DataLoader starts workers.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from newton_plugin.algorithms._shortest_paths.cheapest import check_costs

__all__ = ["solve_graph", "solve_grid"]

_jit: Any = numba.njit  # numba has no type stubs


@_jit("boolean(float64[:,:,::1], float64[::1], uint8[:,:,::1])", nogil=True, cache=True)
def _grid(costs, distance, path):
    """Fill ``distance`` (B) and ``path`` (B, h, w); False at the first map with a bad cost.

    Maps lie in a frame of vertices that count as seen, so that neighbours need no check of their bounds. The heap is
    ordered by (d, rank), where rank = (vertices on the way) * n + vertex.
    """
    batch, h, w = costs.shape
    width = w + 2
    n = (h + 2) * width
    around = (-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1)  # row-major
    start, goal = width + 1, h * width + w
    cost, seen, before = np.empty(n), np.empty(n, np.uint8), np.empty(n, np.int32)
    d, rank, heap = np.empty(n), np.empty(n, np.int64), np.empty(h * w, np.int32)
    for b in range(batch):
        seen[:] = 1
        good = True
        for i in range(h):
            for j in range(w):
                c = costs[b, i, j]
                good &= (c >= 0) and (c < np.inf)
                v = (i + 1) * width + j + 1
                cost[v], seen[v], path[b, i, j] = c, 0, 0
        if not good:
            return False
        d[start], rank[start], seen[start] = cost[start], n + start, 1
        heap[0] = start
        size = 1
        while not seen[goal]:
            u = heap[0]
            size -= 1
            if size:  # the last entry takes the top and sinks
                last = heap[size]
                i, k = 0, 1
                while k < size:
                    child = heap[k]
                    if k + 1 < size:
                        other = heap[k + 1]
                        if d[other] < d[child] or (d[other] == d[child] and rank[other] < rank[child]):
                            child = other
                            k += 1
                    if d[last] < d[child] or (d[last] == d[child] and rank[last] < rank[child]):
                        break
                    heap[i] = child
                    i, k = k, 2 * k + 1
                heap[i] = last
            for step in around:
                v = u + step
                if not seen[v]:
                    seen[v], before[v] = 1, u
                    d[v], rank[v] = d[u] + cost[v], (rank[u] // n + 1) * n + v
                    i = size
                    size += 1
                    while i > 0:  # the new entry rises from the end
                        parent = heap[(i - 1) // 2]
                        if d[parent] < d[v] or (d[parent] == d[v] and rank[parent] < rank[v]):
                            break
                        heap[i] = parent
                        i = (i - 1) // 2
                    heap[i] = v
        distance[b] = d[goal]
        v = goal
        while v != start:
            path[b, v // width - 1, v % width - 1] = 1
            v = before[v]
        path[b, 0, 0] = 1
    return True


@_jit(
    "boolean(float64[:,::1], int64[::1], int64[::1], int64[::1], int64[::1], int64, int64, float64[::1], uint8[:,::1])",
    nogil=True,
    cache=True,
)
def _graph(costs, first, leaving, tail, head, source, target, distance, path):
    """The same for directed edges: costs and path (B, E); edges ``leaving[first[u] : first[u + 1]]`` leave u.

    Here a vertex may be improved after it entered the heap, and then enters it again; when it comes out a second
    time it is skipped. The heap is ordered by (d, edges on the way); ``via`` is the edge by which a vertex is reached.
    """
    batch, edges = costs.shape
    n = len(first) - 1
    d, count = np.empty(n), np.empty(n, np.int64)
    settled, via = np.empty(n, np.uint8), np.empty(n, np.int64)
    heap_d, heap_count, heap_v = np.empty(edges + 1), np.empty(edges + 1, np.int64), np.empty(edges + 1, np.int64)
    for b in range(batch):
        good = True
        for e in range(edges):
            c = costs[b, e]
            good &= (c >= 0) and (c < np.inf)
            path[b, e] = 0
        if not good:
            return False
        d[:], count[:], settled[:], via[:] = np.inf, n + 1, 0, -1
        d[source], count[source] = 0.0, 0
        heap_d[0], heap_count[0], heap_v[0] = 0.0, 0, source
        size = 1
        while size and not settled[target]:
            u = heap_v[0]
            size -= 1
            top_d, top_count = heap_d[size], heap_count[size]
            i, k = 0, 1
            while k < size:
                if k + 1 < size and (
                    heap_d[k + 1] < heap_d[k] or (heap_d[k + 1] == heap_d[k] and heap_count[k + 1] < heap_count[k])
                ):
                    k += 1
                if top_d < heap_d[k] or (top_d == heap_d[k] and top_count <= heap_count[k]):
                    break
                heap_d[i], heap_count[i], heap_v[i] = heap_d[k], heap_count[k], heap_v[k]
                i, k = k, 2 * k + 1
            heap_d[i], heap_count[i], heap_v[i] = top_d, top_count, heap_v[size]
            if settled[u]:
                continue
            settled[u] = 1
            for j in range(first[u], first[u + 1]):
                e = leaving[j]
                v = head[e]
                if settled[v]:
                    continue
                new_d, new_count = d[u] + costs[b, e], count[u] + 1
                if new_d < d[v] or (new_d == d[v] and new_count < count[v]):
                    d[v], count[v], via[v] = new_d, new_count, e
                    i = size
                    size += 1
                    while i > 0:
                        p = (i - 1) // 2
                        if heap_d[p] < new_d or (heap_d[p] == new_d and heap_count[p] <= new_count):
                            break
                        heap_d[i], heap_count[i], heap_v[i] = heap_d[p], heap_count[p], heap_v[p]
                        i = p
                    heap_d[i], heap_count[i], heap_v[i] = new_d, new_count, v
                elif new_d == d[v] and new_count == count[v] and e < via[v]:
                    via[v] = e
        distance[b] = d[target]
        v = target if settled[target] else source
        while v != source:
            e = via[v]
            path[b, e] = 1
            v = tail[e]
    return True


def solve_grid(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (B) and paths (B, h, w) of ``costs`` (B, h, w)."""
    return _solve("costs", costs, _grid)


def solve_graph(costs: Tensor, edges: Tensor, source: int, target: int, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Distances (B), infinite without a path, and paths (B, E) of edge costs (B, E)."""
    tail, head = edges.detach().cpu().long().contiguous()
    leaving = tail.argsort(stable=True)
    first = torch.nn.functional.pad(tail.bincount(minlength=num_nodes).cumsum(0), (1, 0))
    graph = [t.numpy() for t in (first, leaving, tail, head)]
    return _solve("edge_costs", costs, lambda c, d, p: _graph(c, *graph, source, target, d, p))


def _solve(name: str, costs: Tensor, kernel: Callable[[Any, Any, Any], bool]) -> tuple[Tensor, Tensor]:
    wide = costs.to("cpu", torch.float64)
    distance, path = wide.new_empty(len(wide)), torch.empty(wide.shape, dtype=torch.uint8)
    arrays = wide.numpy(), distance.numpy(), path.numpy()
    # A vertex or edge takes about a tenth of a microsecond; starting a thread takes about a hundred.
    threads = max(1, min(torch.get_num_threads(), len(wide), wide.numel() // 8192))
    size = math.ceil(len(wide) / threads)
    bad: list[bool] = []

    def work(part: slice) -> None:
        if not kernel(*(a[part] for a in arrays)):
            bad.append(True)

    parts = [slice(k * size, (k + 1) * size) for k in range(threads)]
    others = [threading.Thread(target=work, args=(part,)) for part in parts[1:]]
    for thread in others:
        thread.start()
    work(parts[0])
    for thread in others:
        thread.join()
    if bad:
        check_costs(name, costs)
    return distance.to(costs.device), path.to(costs.device)
