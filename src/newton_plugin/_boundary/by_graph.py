"""``boundary="auto"``: where outputs meet the loss, read off the autograd graph.

Walking from the loss towards the inputs, the first operations that apply parameters as weights to data are the model's
last layers (``layers.py`` says which those are). What they return are the outputs; the operations after them are the
loss, whether or not parameters enter there element by element: a temperature, a log-variance, a loss weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from newton_plugin._boundary.autograd_graph import (
    Edge,
    edge_shape,
    explore,
    is_leaf,
    operation,
)
from newton_plugin._boundary.axes import axis_of_layer, told_by
from newton_plugin._boundary.beside import beside_in, names_of
from newton_plugin._boundary.finder import Cut, Part, boundaries_at, describe
from newton_plugin._boundary.layers import Layers
from newton_plugin._boundary.names import layer_name, parameter_names
from newton_plugin._boundary.nested import merge_nested
from newton_plugin._boundary.opaque import SCRIPTED, hides_parameters, is_scripted
from newton_plugin._boundary.parts import parts_of
from newton_plugin._boundary.terms import is_combination_of_terms, without_terms
from newton_plugin._boundary.towards_loss import towards_loss

__all__ = ["GraphFinder"]

_REDUCTIONS = frozenset(("Div", "Mean", "Mul", "Neg", "Squeeze", "Sum", "View"))


class GraphFinder:
    """Finds boundaries by the autograd graph alone.

    Views, casts and the stacking of several outputs after the last layer belong to the model: the boundary has the
    shape that the loss sees. Terms of the loss that depend on parameters only, such as weight decay, are not outputs;
    their gradients stay as they are.
    """

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def attach(self, module: nn.Module) -> None:
        """Note the names of ``module``'s parameters, for messages and states."""
        self._names = parameter_names(module)

    def detach(self) -> None:
        """Forget the names."""
        self._names = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Does nothing: the graph records itself."""
        yield

    def __call__(self, loss: Tensor) -> Cut:
        root = loss.grad_fn
        assert root is not None
        layers = Layers()
        graph = explore(root, lambda edge: _may_be_outputs(edge, layers), skip=layers.is_parameter)
        # Beside a layer, what is picked from a parameter by index is a part of the loss: transition scores, say.
        outputs = [edge for edge in graph.stops if not layers.is_lookup(edge[0])] or graph.stops
        named = {edge: self._part(edge, layers, k) for k, edge in enumerate(outputs)}
        if not named and not graph.preconditioned:
            # No layer. If the loss depends on one leaf, the outputs themselves are what is optimised.
            leaves = explore(root, lambda edge: is_leaf(edge[0]))
            if len(leaves.stops) == 1 and edge_shape(leaves.stops[0]):
                graph = leaves
                named = {leaves.stops[0]: Part(layer_name(leaves.stops[0][0], self._names, layers) or "leaf", None)}
            else:
                return Cut([], description=describe(leaves))
        edges, transposed = towards_loss(named, graph, layers)
        edges, merged, nested = merge_nested(edges, graph, layers)
        while merged:
            edges, again = towards_loss(edges, graph, layers)
            transposed += again
            edges, merged, unresolved = merge_nested(edges, graph, layers)
            nested += unresolved
        operations = set(map(operation, graph.nodes))
        for edge, axis in told_by(graph.nodes, operations).items():
            if edge in edges:
                edges[edge] = edges[edge]._replace(axis=axis)
        cut = boundaries_at(without_terms(edges), graph)
        cut.transposed, cut.nested = transposed, nested
        cut.parts = parts_of(edges, graph, layers, operations)
        cut.beside = names_of(beside_in(graph, cut.boundaries), self._names, layers)
        cut.hidden = [node.name() for node in graph.nodes if hides_parameters(node)]
        if SCRIPTED in operations:
            cut.hidden += [node.name() for node in graph.nodes if is_scripted(node)]
        if operations <= _REDUCTIONS:
            # The loss only adds up what a script returned: it has been computed inside.
            cut.hidden += [edge[0].name() for edge in graph.stops if is_scripted(edge[0])]
        if "CompiledFunction" in operations and any(
            operation(node) == "CompiledFunction" and layers.owns_parameters(node) for node in graph.nodes
        ):
            cut.left_out.append("what torch.compile has made one operation of, network and loss together")
        return cut

    def _part(self, edge: Edge, layers: Layers, number: int) -> Part:
        """What is known about a layer's output. Each output of an operation counts as another layer."""
        name = layer_name(edge[0], self._names, layers) or f"output{number}"
        applied = frozenset([(held, edge[1]) for held in layers.applied_by(edge[0])])
        return Part(name, applied or None, axis_of_layer(edge, layers), frozenset([edge]))


def _may_be_outputs(edge: Edge, layers: Layers) -> bool:
    """Whether a layer ends at the edge, on data: not a combination of terms of the loss."""
    if not layers.ends_here(edge[0]):
        return False
    shape = edge_shape(edge)
    return bool(shape) and (math.prod(shape[:-1]) > 1 or not is_combination_of_terms(edge, layers))
