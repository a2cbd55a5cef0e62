"""Exact shortest paths over a grid of costs, whole batches at once.

Costs belong to vertices: ``D[start] = c[start]``, and for every other vertex ``D[v] = c[v] + min D[u]`` over its
(up to eight) neighbours u. Which neighbour is the cheapest does not depend on v's own cost, so Dijkstra's algorithm
needs no decrease-key here: the first neighbour to be settled is v's predecessor, and v enters the heap exactly once.

**Ties.** The path is read from the goal backwards. The predecessor of a vertex is its neighbour with the smallest
distance; of several, one that is reached over fewest vertices; of several, the first in row-major order. (The second
clause also keeps the path simple where costs are zero.) Distances are sums in float64 from start to goal, in this
order, so the distances and the paths are the same in every backend, bit for bit.
"""

from __future__ import annotations

from torch import Tensor

from newton_plugin._errors import check_choice, check_floating
from newton_plugin._runtime.compiler import eager
from newton_plugin.algorithms._shortest_paths.backend import compiled
from newton_plugin.algorithms._shortest_paths.cheapest import Cheapest, ShortestPath, check_distance
from newton_plugin.algorithms._shortest_paths.grid import check_grid
from newton_plugin.algorithms._shortest_paths.rounds_torch import solve_grid

__all__ = ["shortest_path"]


@eager
def shortest_path(costs: Tensor, *, backend: str = "auto") -> ShortestPath:
    r"""The cheapest path from the top left to the bottom right corner, by steps to any of the 8 neighbours.

    .. math:: \text{distance} = \min_{\text{paths}} \sum_{v \in \text{path}} c_v

    with the costs of both ends counted.

    Args:
        costs: (..., h, w), floating point, finite, not negative; any number of maps.
        backend: ``"numba"`` (compiled Dijkstra on the CPU; tensors of other devices are copied there),
            ``"torch"`` (min-plus iteration on the tensor's own device), or ``"auto"``: numba for CPU tensors if it
            is installed. The results are the same, ties included (see the module's docstring for the rule).

    Returns:
        A named tuple: ``distance`` (...) and ``path`` (..., h, w), 1 on the vertices of the path and 0 elsewhere,
        both in the dtype of the costs.

    The distance is differentiable: its gradient is the path (of tied paths, the one returned). The path itself is
    piecewise constant and carries no gradient; to learn from paths see ``relaxed_bellman_ford``,
    ``StochasticSmoothing``, ``PerturbedOptimizer``.

    Raises:
        ArgumentError: a cost is NaN, negative or infinite; or sums overflow.
        ArgumentTypeError, ShapeError: costs are not floating point or have no (h, w).
        NumbaMissingError: ``backend="numba"`` without numba.

    >>> import torch
    >>> costs = torch.tensor([[1.0, 9.0, 1.0], [1.0, 9.0, 1.0], [9.0, 1.0, 1.0]])
    >>> distance, path = shortest_path(costs)
    >>> distance.item()
    4.0
    >>> path.int().tolist()
    [[1, 0, 0], [1, 0, 0], [0, 1, 1]]
    """
    check_choice("backend", backend, ("auto", "numba", "torch"))
    check_floating("costs", costs)
    check_grid(costs)
    numba = compiled(backend, costs)
    solve = solve_grid if numba is None else numba.solve_grid

    def solver(problems: Tensor) -> tuple[Tensor, Tensor]:
        distance, path = solve(problems)
        check_distance("costs", problems, distance)
        return distance, path

    return ShortestPath(*Cheapest.apply(costs, solver, 2))
