"""Which operations of a graph are layers: those that apply parameters as weights to data.

Every node is one of four things.

================  =====================================================  =============================================
a node is         example                                                what it is for the search
================  =====================================================  =============================================
a weight          a parameter, its transpose, weight decay               never outputs; passed over
a layer           ``x @ w``, a convolution, an embedding, a checkpoint   outputs end here
arithmetic with   ``y / temperature``, ``exp(-s) * loss``,               part of the loss where a layer lies below on
a parameter       ``scores + transitions``                               the data side; else a layer (``w * x``)
anything else     ``log_softmax``, ``y - target``                        walked through
================  =====================================================  =============================================

A *weight* was computed from parameters and constants alone. Data, like a constant, requires no grad; so whether
``a @ w`` is a layer on the data a, or a weight, is seen from who uses it: see :meth:`Layers.is_weight`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.autograd.graph import Node

from newton_plugin._boundary.autograd_graph import children, edge_shape, is_leaf, operation
from newton_plugin._boundary.numbered import number_of
from newton_plugin._boundary.opaque import hidden_parameters, hides_parameters
from newton_plugin._boundary.operations import ELEMENTWISE, LOOKUPS, PRODUCTS, REARRANGE, WEIGHTED, is_layer_name
from newton_plugin._boundary.weights import Weights

__all__ = ["Layers"]


class Layers:
    """Answers for the nodes of one loss's graph; each node is looked at once."""

    def __init__(self) -> None:
        self._parameters: dict[Node, bool] = {}
        self._weights = Weights()
        self._below: dict[Node, bool] = {}

    def is_parameter(self, node: Node) -> bool:
        """Whether a tensor was computed from parameters alone, in whatever way. Such a tensor is never outputs.

        The walk goes depth first and without recursion, as graphs are deeper than Python's stack. The answer for one
        layer is no, and so it is for every node computed from it: the walk ends at the first layer it meets.
        """
        known = self._parameters
        verdict = known.get(node)
        if verdict is None:
            verdict = known[node] = _at_sight(node)  # type: ignore[assignment]
        if verdict is not None:
            return verdict
        stack = [(node, iter(node.next_functions))]
        while stack:
            current, rest = stack[-1]
            verdict = True
            for child, _ in rest:
                if child is None:
                    continue
                below = known.get(child)
                if below is None:
                    below = known[child] = _at_sight(child)  # type: ignore[assignment]
                if not below:
                    verdict = below  # not yet known, or no
                    if below is None:
                        stack.append((child, iter(child.next_functions)))
                    break
            if verdict is None:
                continue
            if verdict and _made_of_parameters(current):
                known[current] = True
                stack.pop()
                continue
            known.update((user, False) for user, _ in stack)
            return False
        return True

    def owns_parameters(self, node: Node) -> bool:
        """Whether an input of the operation is a parameter, or was computed from parameters alone."""
        return not is_leaf(node) and any(self.is_parameter(child) for child, _ in children(node))

    def parameters_of(self, node: Node) -> frozenset[Node]:
        """The leaves that an operation applies: of its inputs that were computed from parameters alone."""
        found = set()
        stack = [child for child, _ in node.next_functions if child is not None and self.is_parameter(child)]
        while stack:
            current = stack.pop()
            if is_leaf(current):
                found.add(current)
            else:
                stack += [child for child, _ in current.next_functions if child is not None]
        return frozenset(found)

    def applied_by(self, node: Node) -> set[int]:
        """The numbers of the parameters that a layer applies, also of those that the graph does not show.

        A derivative of a layer, as a physics-informed loss makes it, is no call of the layer: none.
        """
        if _is_derivative(node):
            return set()
        variables = [leaf.variable for leaf in self.parameters_of(node)]  # type: ignore[attr-defined]
        # An input that requires grad is a leaf, too; without nn.Parameters (torch.func) leaves are the weights.
        named = [v for v in variables if isinstance(v, nn.Parameter)]
        applied = {number_of(v) for v in named or variables}
        return applied.union(map(number_of, hidden_parameters(node))) if hides_parameters(node) else applied

    def ends_here(self, node: Node) -> bool:
        """Whether the operation is a layer, so that what it returns may be outputs."""
        # Asked of every node of a loss, and algorithms have thousands.
        known, owns = self._parameters, False
        for child, _ in node.next_functions:
            if child is not None:
                owns = known.get(child)
                if owns is None:
                    owns = self.is_parameter(child)
                if owns:
                    break
        name = operation(node)
        if owns:
            return name not in ELEMENTWISE or not self._has_layer_below(node)
        if name in WEIGHTED:
            return any(self._weights.is_weight(child) for child, _ in children(node))
        return hides_parameters(node)

    def is_lookup(self, node: Node) -> bool:
        """Whether the operation picks from a parameter by index: an embedding written by hand, or transition scores."""
        return operation(node) in LOOKUPS and self.owns_parameters(node)

    def is_bias(self, node: Node, position: int) -> bool:
        """Whether the operation adds a parameter, or entries of one, to its input at ``position``."""
        name = operation(node)
        if name not in ("Add", "Sub") or len(node.next_functions) != 2 or (name == "Sub" and position == 1):
            return False
        if position == 1 and node._saved_alpha != 1:  # type: ignore[attr-defined]
            return False
        other = node.next_functions[1 - position][0]
        return other is not None and (self.is_parameter(other) or self._is_lookup_chain(other))

    def _is_lookup_chain(self, node: Node) -> bool:
        while operation(node) in REARRANGE and operation(node) not in LOOKUPS:
            inputs = list(children(node))
            if len(inputs) != 1:
                return False
            node = inputs[0][0]
        return self.is_lookup(node)

    def is_weight(self, node: Node) -> bool:
        """Whether a factor of a product is a weight; see ``weights.py``."""
        return self._weights.is_weight(node)

    def _is_weighted(self, node: Node) -> bool:
        """Whether the operation is a product or a convolution, one of whose factors is a weight."""
        if operation(node) not in WEIGHTED:
            return False
        inputs = [child for child, _ in children(node)]
        if any(self.is_parameter(child) for child in inputs):
            return True
        return any(self._weights.is_weight(child) for child in inputs)

    def _has_layer_below(self, node: Node) -> bool:
        """Whether the inputs that are no parameters were computed by a layer."""
        known = self._below
        path, stack = [node], [self._data_inputs(node)]
        while stack and path[-1] not in known:
            child = next(stack[-1], None)
            if child is None:
                known[path.pop()] = False
                stack.pop()
            elif known.get(child) or self._is_layer(child):
                known.update(dict.fromkeys(path, True))
            elif child not in known:
                path.append(child)
                stack.append(self._data_inputs(child))
        return known[node]

    def _data_inputs(self, node: Node) -> Iterator[Node]:
        return (child for child, _ in children(node) if not self.is_parameter(child))

    def _is_layer(self, node: Node) -> bool:
        """Whether the operation is a layer whatever lies below; a lookup alone is none."""
        if operation(node) in LOOKUPS or operation(node) in ELEMENTWISE:
            return False
        return self._is_weighted(node) or self.owns_parameters(node) or hides_parameters(node)


def _is_derivative(node: Node) -> bool:
    """Whether the operation belongs to the backward pass of a layer: it transposes a weight that was transposed."""
    for child, _ in node.next_functions:
        if child is not None and operation(child) == "T":
            (source, _), *_ = child.next_functions
            if source is not None and operation(source) == "T":
                return True
    return "BackwardBackward" in node.name()


def _at_sight(node: Node) -> bool | None:
    """:meth:`Layers.is_parameter` for a leaf and for what has the name of a layer; None for all else."""
    if is_leaf(node):
        return True
    return False if is_layer_name(node.name()) else None


def _made_of_parameters(node: Node) -> bool:
    """:meth:`Layers.is_parameter` for a node whose inputs that require grad were all computed from parameters alone."""
    edges = node.next_functions
    inputs = [edge for edge in edges if edge[0] is not None]
    if not inputs or len(inputs) == len(edges):
        return bool(inputs)
    if operation(node) in PRODUCTS:
        return False  # the other factor requires no grad: it is data
    try:
        return edge_shape((node, 0)) == torch.broadcast_shapes(*(edge_shape(edge) for edge in inputs))  # type: ignore[arg-type]
    except RuntimeError:  # they do not broadcast
        return False
