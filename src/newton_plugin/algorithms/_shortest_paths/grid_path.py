"""Exact shortest paths over a grid of costs, whole batches at once.

The price is paid at vertices: ``D[start] = c[start]``, and for every other vertex ``D[v] = c[v] + min D[u]`` over its
(up to eight) neighbours u. Which neighbour is the cheapest does not depend on v's own cost, so Dijkstra's algorithm
needs no decrease-key here: the first neighbour to be settled is v's predecessor, and v enters the heap exactly once.

**Ties.** The path is read from the goal backwards. The predecessor of a vertex is its neighbour with the smallest
distance; of several, one that is reached over fewest vertices; of several, the first in row-major order. (The second
clause also keeps the path simple where costs are zero.) Distances are sums in float64 from start to goal, in this
order, so they and the comparisons are the same bits in every backend.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import Tensor

from newton_plugin._errors import NewtonPluginError, ShapeError, check_choice, check_floating
from newton_plugin._runtime.compiler import eager
from newton_plugin.algorithms._shortest_paths.cheapest import Cheapest, ShortestPath, check_distance
from newton_plugin.algorithms._shortest_paths.rounds_torch import solve_grid

__all__ = ["NumbaMissingError", "compiled", "shortest_path"]


_HAS_NUMBA = importlib.util.find_spec("numba") is not None


class NumbaMissingError(NewtonPluginError, ImportError):
    """``backend="numba"`` was asked for and numba is not installed."""


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
    if costs.ndim < 2 or 0 in costs.shape[-2:]:
        raise ShapeError(
            f"costs must have shape (..., h, w) with h, w >= 1; got {tuple(costs.shape)}. "
            "A model that gives one row per map needs .unflatten(-1, (h, w))."
        )
    numba = compiled(backend, costs)
    solve = solve_grid if numba is None else numba.solve_grid

    def solver(problems: Tensor) -> tuple[Tensor, Tensor]:
        distance, path = solve(problems)
        check_distance("costs", problems, distance)
        return distance, path

    return ShortestPath(*Cheapest.apply(costs, solver, 2))


def compiled(backend: str, costs: Tensor) -> Any | None:
    """The module of compiled solvers if this call should use it, else None."""
    if backend == "torch" or (backend == "auto" and costs.device.type != "cpu"):
        return None
    if not _HAS_NUMBA:
        if backend == "auto":
            return None
        raise NumbaMissingError(
            'backend="numba" needs numba, which is not installed: pip install "newton-plugin[algorithms]". '
            'backend="torch" gives the same result with torch alone, more slowly.'
        )
    from newton_plugin.algorithms._shortest_paths import dijkstra_numba

    return dijkstra_numba
