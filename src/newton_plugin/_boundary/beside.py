"""What a loss reaches without passing a boundary: its own parameters, terms of earlier layers, inputs.

A step is taken at the boundaries. What lies beside them gets the loss's gradient past the step, so whoever takes the
step has to know whether there is anything. The question is asked at every step: it costs one walk over the loss, and
nothing below the boundaries is looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn
from torch.autograd.graph import Node

from newton_plugin._boundary.autograd_graph import (
    Boundary,
    Edge,
    LossGraph,
    children,
    edge_shape,
    explore,
    is_leaf,
    lowest_number,
    operation,
)
from newton_plugin._boundary.layers import Layers
from newton_plugin._boundary.names import layer_name

__all__ = ["beside", "beside_in", "names_of"]

_AT_MOST = 8  # names; a penalty on all weights of a network reaches hundreds of parameters


def beside(root: Node, boundaries: Sequence[Boundary]) -> list[Edge]:
    """The edges at which the ways end that lead from a loss past all its boundaries.

    An edge that is returned stands for a leaf, or for a tensor that was computed before every boundary.

    Args:
        root: the node of the loss.
        boundaries: of this loss; of none, nothing is beside it.
    """
    if not boundaries:
        return []
    stops = {boundary.graph_edge for boundary in boundaries}
    lowest = lowest_number(stops)

    def ends(edge: Edge) -> bool:
        return edge in stops or is_leaf(edge[0]) or edge[0]._sequence_nr() < lowest

    graph = explore(root, ends)
    return [edge for edge in graph.stops if edge not in stops] + [(node, 0) for node in graph.preconditioned]


def beside_in(graph: LossGraph, boundaries: Sequence[Boundary]) -> list[Edge]:
    """:func:`beside` where the graph has been walked: of the edges at which that walk ended."""
    stops = {boundary.graph_edge for boundary in boundaries}
    if not stops:
        return []
    ends = [*graph.stops, *graph.skipped, *((node, 0) for node in graph.preconditioned)]
    reaches: dict[Node, bool] = {graph.nodes[0]: True}
    return [edge for edge in ends if edge not in stops and _is_used_beside(edge, stops, graph, reaches)]


def _is_used_beside(edge: Edge, stops: set[Edge], graph: LossGraph, reaches: dict[Node, bool]) -> bool:
    """Whether a way leads from the edge up to the loss that passes no boundary."""
    users = graph.consumers.get(edge) or graph.skipped.get(edge, [])
    path = [(edge[0], iter([user for user, _ in users]))]
    found = False
    while path:
        node, rest = path[-1]
        user = next(rest, None)
        if user is None:
            path.pop()
            if path:  # of the edge's own node only one output was asked about
                reaches[node] = False
            continue
        known = reaches.get(user)
        if known is None:
            path.append((user, _users_past(user, stops, graph)))
        elif known:
            reaches.update((above, True) for above, _ in path[1:])
            found = True
            break
    return found


def _users_past(node: Node, stops: set[Edge], graph: LossGraph) -> Iterator[Node]:
    """The operations that use an output of ``node`` which is no boundary."""
    for index in range(len(node._input_metadata)):  # type: ignore[attr-defined]
        edge = (node, index)
        if edge not in stops:
            for user, _ in graph.consumers.get(edge, ()):
                yield user


def names_of(edges: Iterable[Edge], parameters: Mapping[int, str], layers: Layers | None = None) -> list[str]:
    """What the edges that :func:`beside` found are called: parameters and layers by name, inputs by their shape.

    Args:
        edges: each stands for a leaf or for a tensor that was computed before every boundary.
        parameters: the names that are known, by the parameter's id.
        layers: what is known about the nodes, where somebody has asked before.
    """
    layers = layers or Layers()
    names: dict[str, None] = {}
    unknown = 0
    for edge in _ends_below(edges, layers):
        if len(names) == _AT_MOST:
            return [*names, "…"]
        name = layer_name(edge[0], parameters, layers)
        if name is None and is_leaf(edge[0]) and isinstance(edge[0].variable, nn.Parameter):  # type: ignore[attr-defined]
            name = f"parameter {unknown} (shape {edge_shape(edge)})"
            unknown += 1
        elif name is None:
            kind = "input" if is_leaf(edge[0]) else operation(edge[0]) or edge[0].name()
            name = f"{kind} (shape {edge_shape(edge)})"
        names[name] = None
    return list(names)


def _ends_below(edges: Iterable[Edge], layers: Layers) -> Iterator[Edge]:
    """The layers and leaves that are met first below the edges, in the order of the edges."""
    stack, seen = list(edges)[::-1], set()
    while stack:
        edge = stack.pop()
        if edge in seen:
            continue
        seen.add(edge)
        if is_leaf(edge[0]) or (layers.ends_here(edge[0]) and not layers.is_parameter(edge[0])):
            yield edge
        else:
            stack += list(children(edge[0]))[::-1]
