"""Outputs that were computed from one another, and reach the loss each on a path of its own.

The walk from the loss met h beside b, though b was computed from h. Stepping b alone would send a step along one path
of h and a plain gradient along the other. What is right depends on the tensor where their paths to the loss meet:

* A *sum of terms* (a VAE's reconstruction and its KL divergence, a penalty of activations): b stays the boundary, and
  the term of h lies beside it.
* Any other tensor (attention, where h makes the scores and holds the values; a gate; a recurrent cell): it is the
  outputs, and takes the place of all boundaries that reach the loss only through it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch.autograd.graph import Node

from newton_plugin._boundary.autograd_graph import (
    Edge,
    LossGraph,
    edge_metadata,
    edge_shape,
    lowest_number,
    operation,
    upstream_edges,
)
from newton_plugin._boundary.axes import stacking_dimension
from newton_plugin._boundary.dominators import DominatorTree
from newton_plugin._boundary.finder import Part, joined_part
from newton_plugin._boundary.layers import Layers
from newton_plugin._boundary.terms import is_sum_of_terms, only_reduced

__all__ = ["merge_nested"]

# What a product of weights and values is summed by: over neighbours, over positions.
_AGGREGATIONS = frozenset(("IndexAdd", "ScatterAdd", "ScatterReduce", "SegmentReduce"))
_OF_A_LEAF = 2**64 - 1  # the number of a leaf's node
_SUMS = frozenset(("Sum", "Mean"))


def merge_nested(
    edges: Mapping[Edge, Part], graph: LossGraph, layers: Layers
) -> tuple[dict[Edge, Part], bool, list[str]]:
    """Boundaries of which none was computed from another.

    Returns:
        The edges that remain, with what is known about them; whether there is a new one among them, which may be moved
        towards the loss; in words, what could not be resolved.
    """
    if len(edges) < 2:
        return dict(edges), False, []
    inputs, nested = _inputs_below(edges.values())
    if not nested:
        return dict(edges), False, []
    merging = _Merging(edges, graph, layers, _sources_of_each(edges, inputs))
    merging.run()
    # Of those that are still nested, the paths meet in a sum of terms.
    terms = {source for edge in merging.parts for source in merging.parts if merging.is_computed_from(edge, source)}
    kept = {edge: part for edge, part in merging.parts.items() if edge not in terms and edge not in merging.unusable}
    return kept, merging.moved, list(merging.unusable.values())


def _inputs_below(parts: Collection[Part]) -> tuple[dict[Node, list[Edge]], bool]:
    """The nodes from all origins down to the lowest of them, each with its inputs; whether one of them is met."""
    origins = {origin for part in parts for origin in part.origins}
    # Derivatives may come from the thread of a device, which has numbers of its own.
    lowest = 0 if any(part.layer is None for part in parts) else lowest_number(origins)
    nodes = {node for node, _ in origins}
    inputs: dict[Node, list[Edge]] = {}
    stack, nested = list(nodes), False
    while stack:
        node = stack.pop()
        if node in inputs:
            continue
        edges = inputs[node] = []
        for child, index in node.next_functions:
            if child is None or not lowest <= child._sequence_nr() < _OF_A_LEAF:
                continue
            edges.append((child, index))
            if child in nodes and (child, index) in origins:
                nested = True
            if child not in inputs:
                stack.append(child)
    return inputs, nested


def _sources_of_each(parts: Mapping[Edge, Part], inputs: Mapping[Node, list[Edge]]) -> dict[Edge, set[Edge]]:
    """For each boundary, those of the others that it was computed from: from all their origins."""
    origins = [origin for part in parts.values() for origin in part.origins]
    bits = {origin: 1 << k for k, origin in enumerate(origins)}
    nodes = {node for node, _ in origins}
    masks: dict[Node, int] = {}  # what a node was computed from, one bit for each origin
    order = sorted(inputs, key=lambda node: node._sequence_nr())
    unordered, changed = False, True
    while changed:
        changed = False
        for node in order:
            mask = 0
            for edge in inputs[node]:
                mask |= masks.get(edge[0], 0)
                if edge[0] in nodes:
                    mask |= bits.get(edge, 0)
                unordered = unordered or edge[0] not in masks
            changed = changed or masks.get(node) != mask
            masks[node] = mask
        # Once is enough, unless nodes were made by several threads, each of which has numbers of its own.
        changed = changed and unordered
    whole, reached = dict.fromkeys(parts, 0), dict.fromkeys(parts, 0)
    for edge, part in parts.items():
        for origin in part.origins:
            whole[edge] |= bits[origin]
            reached[edge] |= masks[origin[0]]
    return {e: {f for f in parts if f != e and reached[e] & whole[f] == whole[f]} for e in parts}


class _Merging:
    """The dominator tree from its leaves to the loss: at each edge, what meets there is looked at.

    Attributes:
        parts: the boundaries so far.
        sources: of each boundary, the others that it was computed from.
        moved: whether a boundary took the place of others.
        unusable: in words, tensors that had to be the outputs and cannot be.
    """

    def __init__(
        self, edges: Mapping[Edge, Part], graph: LossGraph, layers: Layers, sources: dict[Edge, set[Edge]]
    ) -> None:
        self.parts, self.sources = dict(edges), sources
        self.graph, self.layers = graph, layers
        self.tree = DominatorTree(edges, graph)
        # Pairs of which it is not known yet whether the first was computed from the second.
        self._open: set[tuple[Edge, Edge]] = set()
        self.moved = False
        self.unusable: dict[Edge, str] = {}

    def run(self) -> None:
        # Of every edge of the tree: the boundaries that it dominates, one list for each branch.
        branches: dict[Edge, list[list[Edge]]] = {}
        for edge in reversed(self.tree.order):
            groups = branches.pop(edge, [])
            if edge in self.parts:
                groups.append([edge])
            found = [boundary for group in groups for boundary in group]
            if len(groups) > 1 and self._meet(groups) and not is_sum_of_terms(edge, self.graph, self.layers):
                found = [self._take_place(edge, found)]
            parent = self.tree.parent.get(edge)
            if parent is not None and found:
                branches.setdefault(parent, []).append(found)

    def _meet(self, groups: list[list[Edge]]) -> bool:
        """Whether a boundary of one branch was computed from one of another."""
        place = {edge: k for k, group in enumerate(groups) for edge in group}
        return any(
            place.get(source, k) != k and self.is_computed_from(edge, source)
            for edge, k in place.items()
            for source in list(self.sources[edge])
        )

    def is_computed_from(self, edge: Edge, source: Edge) -> bool:
        """Whether one boundary was computed from another. Of a new one it is found out when it is asked."""
        if (edge, source) in self._open:
            self._open.discard((edge, source))
            if not upstream_edges(edge, self.parts[source].origins):
                self.sources[edge].discard(source)
        return source in self.sources[edge]

    def _take_place(self, edge: Edge, boundaries: list[Edge]) -> Edge:
        """The outputs at ``edge`` in place of the boundaries that it dominates."""
        # Outputs that were computed from one another are no samples: a stack of them counts time steps, or branches.
        stacked = stacking_dimension(edge) == 0
        outputs = edge if stacked else only_reduced(edge, self.graph, _AGGREGATIONS, _SUMS)
        latest = max(boundaries, key=lambda boundary: boundary[0]._sequence_nr())
        first = self.parts[latest]
        parts = [self.parts.pop(boundary) for boundary in boundaries]
        sources = set().union(*(self.sources.pop(boundary) for boundary in boundaries)).difference(boundaries)
        self._open |= {(outputs, s) for b in boundaries for s in sources if (b, s) in self._open}
        part = joined_part(first, parts)._replace(
            name=_common_name(parts, first.name), origins=frozenset([edge]), axis=int(stacked)
        )
        dtype = edge_metadata(edge).dtype
        if not dtype.is_floating_point:
            self.unusable[outputs] = f"{part.name!r} (shape {edge_shape(edge)}), {dtype}, where {operation(edge[0])}"
        # What was computed from one of the boundaries may have been computed from the outputs.
        for other, before in self.sources.items():
            if not before.isdisjoint(boundaries):
                before.difference_update(boundaries)
                before.add(outputs)
                self._open.add((other, outputs))
        self.parts[outputs], self.sources[outputs] = part, sources
        self.moved = True
        return outputs


def _common_name(parts: list[Part], otherwise: str) -> str:
    """The module that holds all the layers: "conv" for "conv.values" and "conv.scores"."""
    paths = [part.name.split(".") for part in parts]
    shared = [names[0] for names in zip(*paths, strict=False) if len(set(names)) == 1]
    return ".".join(shared) or otherwise
