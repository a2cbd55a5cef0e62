"""The terms of a loss: what is one of them, and whether what meets at a tensor is added up as terms are."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from torch.autograd.graph import Node

from newton_plugin._boundary.autograd_graph import Edge, LossGraph, children, edge_shape, operation
from newton_plugin._boundary.dominators import users_of
from newton_plugin._boundary.finder import Part
from newton_plugin._boundary.layers import Layers

__all__ = ["is_added_up", "is_combination_of_terms", "is_sum_of_terms", "only_reduced", "without_terms"]

_ADDITIONS = frozenset(("Add", "Sub", "Rsub", "Stack", "Cat", "Where"))
# Linear in each input that requires grad.
_LINEAR = _ADDITIONS | {
    *("Alias", "AsStrided", "Clone", "Expand", "Gather", "Index", "IndexSelect", "MaskedFill", "MaskedSelect", "Mean"),
    *("NanSum", "Nansum", "NativeDropout", "Neg", "Permute", "Repeat", "ReshapeAlias", "Select", "Slice", "Split"),
    *("SplitWithSizes", "Squeeze", "Sum", "T", "ToCopy", "Transpose", "Unbind", "UnsafeView", "Unsqueeze", "View"),
}
# Linear in one input where the other is a constant or a parameter.
_PRODUCTS = frozenset(("Mul", "Div", "Dot", "Mv", "Mm", "Bmm", "Addmm", "Addmv"))
_SAME_NUMBERS = frozenset(("Squeeze", "View", "UnsafeView", "ReshapeAlias", "ToCopy", "Clone", "Alias"))


def is_combination_of_terms(edge: Edge, layers: Layers) -> bool:
    """Whether a layer was applied to the terms of a loss: to single numbers, stacked. It is a part of the loss.

    Only one row can be that. A batch of one sample is told from terms by what it was computed from.
    """
    stack, seen, numbers = [edge[0]], {edge[0]}, False
    while stack:
        inputs = [child for child in children(stack.pop()) if not layers.is_parameter(child[0])]
        if not inputs:
            return False  # it was computed from constants
        for child in inputs:
            if not edge_shape(child):
                numbers = True
            elif child[0] not in seen:
                seen.add(child[0])
                stack.append(child[0])
    return numbers


def without_terms(edges: Mapping[Edge, Part]) -> dict[Edge, Part]:
    """The edges but for single numbers beside a batch: one row of one feature is a term of the loss.

    A call of a layer that has other calls here is none, whatever its batch; nor is an empty batch.
    """
    if len(edges) < 2 or not any(edge_shape(edge)[0] > 1 for edge in edges):
        return dict(edges)
    single = {edge for edge in edges if math.prod(edge_shape(edge)) == 1}
    others = {part.layer for edge, part in edges.items() if edge not in single and part.layer is not None}
    return {edge: part for edge, part in edges.items() if edge not in single or part.layer in others}


def is_sum_of_terms(edge: Edge, graph: LossGraph, layers: Layers) -> bool:
    """Whether what meets at ``edge`` is added there, and then only added up, averaged and weighed until the loss.

    One number is a term whatever follows: the loss itself, or what the loss is a function of.
    """
    if edge_shape(edge) in ((), (1,)):
        return True
    return operation(edge[0]) in _ADDITIONS and is_added_up(edge, graph, layers)


def is_added_up(edge: Edge, graph: LossGraph, layers: Layers, numbers: bool = False) -> bool:
    """Whether the loss is linear in the tensor, but for weights that are constants or parameters.

    Args:
        numbers: whether what follows single numbers counts, too. It does not for the terms of a loss.
    """
    stack, seen = [edge], {edge}
    while stack:
        current = stack.pop()
        if not edge_shape(current) and not numbers:
            continue
        if not all(_is_linear(node, position, layers) for node, position in graph.consumers.get(current, ())):
            return False
        for user in users_of(current, graph):
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return True


def _is_linear(node: Node, position: int, layers: Layers) -> bool:
    name = operation(node)
    if name in _LINEAR:
        return True
    if name not in _PRODUCTS or (name == "Div" and position == 1):
        return False
    others = [child for k, (child, _) in enumerate(node.next_functions) if k != position and child is not None]
    return all(layers.is_parameter(other) for other in others)


def only_reduced(edge: Edge, graph: LossGraph, aggregations: Collection[str], sums: Collection[str]) -> Edge:
    """The last tensor that sums this one's entries, over any dimension but the first, or over groups of rows."""
    reduced = current = edge
    while True:
        users = graph.consumers.get(current, [])
        if len(users) != 1:
            return reduced
        node, _ = users[0]
        name, after = operation(node), (node, 0)
        if after not in graph.consumers or not edge_shape(after) or len(list(children(node))) != 1:
            return reduced
        if name in aggregations or (name in sums and 0 not in _dimensions(node, len(edge_shape(current)))):
            reduced = after
        elif name not in _SAME_NUMBERS:
            return reduced
        current = after


def _dimensions(node: Node, ndim: int) -> set[int]:
    """The dimensions over which a node sums; all, where it names none."""
    dims = getattr(node, "_saved_dim", None)
    return {dim % ndim for dim in dims} if dims else {0}
