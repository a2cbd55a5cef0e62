"""Which factors of a product are weights: parameters rearranged, rescaled, updated or normalised."""

from __future__ import annotations

import functools
from typing import Any

from torch.autograd.graph import Node

from newton_plugin._boundary.autograd_graph import children, edge_shape, is_leaf, operation
from newton_plugin._boundary.operations import ELEMENTWISE, PRODUCTS, REARRANGE, WEIGHTED, is_layer_name

__all__ = ["Weights"]


class Weights:
    """Answers for the nodes of one loss's graph; each node is looked at once."""

    def __init__(self) -> None:
        self._weights: dict[Node, bool] = {}

    def is_weight(self, node: Node) -> bool:
        """Whether a factor of a product is a weight: a parameter rearranged, rescaled, updated or normalised.

        That is: a parameter's numbers in other places; or an element-by-element function of a weight of the same shape
        and of what was computed from that weight (``w / sigma``, ``w - lr * gradient``); or any function of weights
        alone (``matrix_exp(a)``); or a constant square matrix times a weight (an orthogonal weight and its base).
        """
        stack, known = [node], self._weights
        while stack:
            current = stack[-1]
            if current in known:
                stack.pop()
                continue
            wanted = self._weight_inputs(current)
            if isinstance(wanted, bool):
                known[current] = wanted
            else:
                inputs, enough = wanted
                unknown = [child for child in inputs if child not in known and child not in stack]
                if unknown:
                    stack.append(unknown[0])
                    continue
                known[current] = enough([known.get(child, False) for child in inputs])
            stack.pop()
        return known[node]

    def _weight_inputs(self, node: Node) -> bool | tuple[list[Node], Any]:
        """The verdict; or the inputs on which it depends, and whether any of them or all have to be weights."""
        if is_leaf(node):
            return True
        name = operation(node)
        inputs = list(children(node))
        if not inputs:
            return False
        if name in REARRANGE:
            return [child for child, _ in inputs], all
        shape = edge_shape((node, 0))
        if name in ELEMENTWISE:
            same = [child for child, index in inputs if edge_shape((child, index)) == shape]
            if not same:
                return [child for child, _ in inputs], all
            others = [child for child, index in inputs if edge_shape((child, index)) != shape]
            return same, functools.partial(self._keeps_to_weights, same, others)
        if name in WEIGHTED:
            # A constant square matrix times a weight that was computed: the base of an orthogonal weight. Data times a
            # parameter may have the same shape by chance, but its parameter is used as it is.
            based = len(inputs) == 1 and name in PRODUCTS and edge_shape(inputs[0]) == shape
            return ([inputs[0][0]], all) if based and not _is_rearranged_leaf(inputs[0][0]) else False
        if is_layer_name(node.name()) or any(child is None for child, _ in node.next_functions):
            return False
        return [child for child, _ in inputs], all

    def _keeps_to_weights(self, same: list[Node], others: list[Node], verdicts: list[bool]) -> bool:
        """Whether one of ``same`` is a weight, and all other inputs are weights or were computed from that one."""
        weights = [child for child, weight in zip(same, verdicts, strict=True) if weight]
        rest = [child for child, weight in zip(same, verdicts, strict=True) if not weight] + others
        return bool(weights) and all(self.is_weight(child) or _depends_on_leaf_of(child, weights) for child in rest)


def _depends_on_leaf_of(node: Node, weights: list[Node]) -> bool:
    """Whether a tensor was computed from a leaf that the first of ``weights`` was computed from, too."""
    leaf = weights[0]
    while not is_leaf(leaf):
        leaf = next(children(leaf))[0]
    stack, seen = [node], {node}
    while stack:
        for child, _ in children(stack.pop()):
            if child is leaf:
                return True
            if child not in seen:
                seen.add(child)
                stack.append(child)
    return False


def _is_rearranged_leaf(node: Node) -> bool:
    while not is_leaf(node):
        inputs = list(children(node))
        if operation(node) not in REARRANGE or len(inputs) != 1:
            return False
        node = inputs[0][0]
    return True
