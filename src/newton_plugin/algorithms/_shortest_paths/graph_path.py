"""Exact shortest paths in a directed graph, batched over the costs of its edges.

``D[source] = 0`` and ``D[v] = min D[u] + c[e]`` over the edges e from u to v.

**Ties.** The path is read from the target backwards: into v leads the edge of the smallest ``D[u] + c[e]``; of
several, one by which v is reached over fewest edges; of several, the one listed first. As on the grid, sums are taken
in float64 from the source on, and all backends give the same bits.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError, ShapeError, check_choice, check_floating
from newton_plugin._runtime.compiler import eager
from newton_plugin.algorithms._log_domain import wide
from newton_plugin.algorithms._shortest_paths.backend import compiled
from newton_plugin.algorithms._shortest_paths.cheapest import Cheapest, ShortestPath, check_costs, check_distance
from newton_plugin.algorithms._shortest_paths.rounds_torch import ROUNDS

__all__ = ["shortest_path_graph"]


@eager
def shortest_path_graph(
    edge_costs: Tensor, edges: Tensor, source: int, target: int, num_nodes: int, *, backend: str = "auto"
) -> ShortestPath:
    r"""The cheapest path from ``source`` to ``target`` over directed edges.

    .. math:: \text{distance} = \min_{\text{paths}} \sum_{e \in \text{path}} c_e

    Args:
        edge_costs: (..., E), floating point, finite, not negative; any number of problems on one graph.
        edges: (2, E), integers: edge e leads from ``edges[0, e]`` to ``edges[1, e]``. A street that can be walked in
            both directions is two edges. Parallel edges and loops are allowed.
        source, target: vertices, 0 to num_nodes - 1.
        num_nodes: number of vertices.
        backend: as for :func:`shortest_path`.

    Returns:
        A named tuple: ``distance`` (...), differentiable with the path as gradient, and ``path`` (..., E), 1 on the
        edges of the path and 0 elsewhere (all 0 if source is target).

    Raises:
        ArgumentError: bad costs or vertices; no path leads from source to target.
        ArgumentTypeError, ShapeError, NumbaMissingError: as they say.

    Two ways from 0 to 2, directly for 5 or over 1 for 1 + 3:

    >>> edges = torch.tensor([[0, 0, 1], [2, 1, 2]])
    >>> distance, path = shortest_path_graph(torch.tensor([5.0, 1.0, 3.0]), edges, source=0, target=2, num_nodes=3)
    >>> distance.item(), path.tolist()
    (4.0, [0.0, 1.0, 1.0])
    """
    check_choice("backend", backend, ("auto", "numba", "torch"))
    check_floating("edge_costs", edge_costs)
    source, target, num_nodes = _check_graph(edge_costs, edges, source, target, num_nodes)
    numba = compiled(backend, edge_costs)
    solve = _solve_graph if numba is None else numba.solve_graph

    def solver(problems: Tensor) -> tuple[Tensor, Tensor]:
        distance, path = solve(problems, edges, source, target, num_nodes)
        if not bool((distance < torch.inf).all()):
            _check_reachable(edges, source, target, num_nodes)
            check_distance("edge_costs", problems, distance)
        return distance, path

    return ShortestPath(*Cheapest.apply(edge_costs, solver, 1))


def _check_graph(edge_costs: Tensor, edges: Any, source: Any, target: Any, num_nodes: Any) -> tuple[int, int, int]:
    if not isinstance(edges, Tensor) or edges.dtype not in (torch.int64, torch.int32):
        received = edges.dtype if isinstance(edges, Tensor) else type(edges).__name__
        raise ArgumentTypeError(f"edges must be a tensor of int64 or int32; got {received}. Pass edges.long().")
    if edges.ndim != 2 or edges.shape[0] != 2 or edge_costs.ndim == 0 or edges.shape[1] != edge_costs.shape[-1]:
        raise ShapeError(
            f"edge_costs must be (..., E) and edges (2, E); got {tuple(edge_costs.shape)} and {tuple(edges.shape)}. "
            "A list of pairs (E, 2) needs edges.T."
        )
    try:
        num_nodes = operator.index(num_nodes)
    except TypeError:
        raise ArgumentTypeError(f"num_nodes must be an integer, the number of vertices; got {num_nodes!r}.") from None
    ends = []
    for name, vertex in (("source", source), ("target", target)):
        try:
            ends.append(operator.index(vertex))
        except TypeError:
            raise ArgumentTypeError(
                f"{name} must be an integer, the index of one vertex; got {vertex!r}. "
                "Problems with other ends need a call of their own."
            ) from None
        if not 0 <= ends[-1] < num_nodes:
            raise ArgumentError(f"{name} must be a vertex, 0 to num_nodes - 1 = {num_nodes - 1}; got {ends[-1]}.")
    if edges.numel() and not bool(((edges >= 0) & (edges < num_nodes)).all()):
        raise ArgumentError(
            f"edges must join vertices 0 to num_nodes - 1 = {num_nodes - 1}; got {int(edges.min())} to "
            f"{int(edges.max())}. Pass a larger num_nodes, and leave padding out: graphs differ in a call of their own."
        )
    return ends[0], ends[1], num_nodes


def _check_reachable(edges: Tensor, source: int, target: int, num_nodes: int) -> None:
    """Raise if no path leads to the target. Called only if a distance is infinite although the costs are finite."""
    reached = torch.zeros(num_nodes, dtype=torch.bool, device=edges.device)
    reached[source] = True
    before = -1
    while int(reached.sum()) > before:
        before = int(reached.sum())
        reached[edges[1, reached[edges[0]]]] = True
    if not bool(reached[target]):
        raise ArgumentError(
            f"target must be reachable from source; no path leads from {source} to {target}. "
            "Edges are directed: for streets both ways pass torch.cat([edges, edges.flip(0)], 1)."
        )


def _solve_graph(costs: Tensor, edges: Tensor, source: int, target: int, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Bellman-Ford on all problems at once: distances (B), infinite without a path, and paths (B, E)."""
    c = wide(costs)
    check_costs("edge_costs", c)
    tail, head = edges.to(c.device).long()
    into = head.expand_as(c)

    def settle(initial: Tensor, price: Tensor) -> Tensor:
        """``d <- min(d, d[tail] + price)`` until nothing changes."""
        d, before = initial, None
        while before is None or not torch.equal(before, d):
            before = d
            for _ in range(ROUNDS):
                d = d.scatter_reduce(1, into, d[:, tail] + price, "amin")
        return d

    start = c.new_full((len(c), num_nodes), torch.inf)
    start[:, source] = 0
    d = settle(start, c)
    # Edges that attain D; among them those by which a vertex is reached over fewest edges.
    cheapest = (d[:, tail] + c == d[:, head]) & (d[:, tail] < torch.inf)
    count = settle(start, torch.where(cheapest, 1.0, torch.inf))
    chosen = cheapest & (count[:, tail] + 1 == count[:, head])
    number = torch.arange(edges.shape[1], device=c.device)
    none = edges.shape[1]
    via = torch.full((len(c), num_nodes), none, device=c.device)
    via = via.scatter_reduce(1, into, torch.where(chosen, number, none), "amin")
    via[:, source] = none
    # An extra edge without a cost leads from the source to itself: finished walks stay there.
    before = torch.nn.functional.pad(tail, (0, 1), value=source)
    path = torch.zeros((len(c), none + 1), dtype=torch.uint8, device=c.device)
    at = torch.full((len(c), 1), target, device=c.device)
    steps = count[:, target].nan_to_num(posinf=0.0)
    for _ in range(int(steps.max()) if len(c) else 0):
        edge = via.gather(1, at)
        path.scatter_(1, edge, 1)
        at = before[edge]
    return d[:, target], path[:, :-1]
