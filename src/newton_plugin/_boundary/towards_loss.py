"""How far a boundary is moved from the layer towards the loss: over what belongs to the model.

Operations that reshape the outputs, cast them, add a bias or join several outputs belong to the model; so the boundary
has the shape that the loss sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch.autograd.graph import Node

from newton_plugin._boundary.autograd_graph import Edge, LossGraph, children, edge_shape, known_hessian, operation
from newton_plugin._boundary.axes import ONE_SAMPLE, TRANSPOSITIONS, axis_after, stacking_dimension
from newton_plugin._boundary.finder import Part, joined_part
from newton_plugin._boundary.layers import Layers

__all__ = ["towards_loss"]

# Operations whose output holds the same numbers as their input. They belong to the model; the loss begins after them.
_SAME_NUMBERS = frozenset(("Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze")) | {
    *("T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View")
}
# Operations that hand on what a model or a layer returned, and belong to it: DDP's tells it that the backward pass has
# begun, torch's own calls the backward hooks of a module.
_HANDED_THROUGH = frozenset(("_DDPSink", "BackwardHookFunction"))
_JOINS = frozenset(["Cat", "Stack"])
_SCALINGS = frozenset(("Div", "Mul", "NativeDropout"))  # by a constant, on the way to a sum of outputs


def towards_loss(named: Mapping[Edge, Part], graph: LossGraph, layers: Layers) -> tuple[dict[Edge, Part], list[str]]:
    """Move each edge towards the loss, over operations that reshape it, cast it, add a bias or join it with others.

    Returns:
        The edges that were reached, with what is known about them; in words, those whose features were transposed on
        the way (the graph does not tell whether the model or the loss wanted that).
    """
    edges, transposed = dict(named), []
    # A loss that brings its own Hessian begins at the edge that it names: an edge is not moved beyond that.
    marked = [known_hessian(node) for node in graph.nodes if node.metadata]
    pinned = {known[0] for known in marked if known is not None}
    moved = True
    while moved:
        moved = False
        for edge, part in list(edges.items()):
            stays = edge in pinned or edge not in edges
            move = None if stays else _next_move(edge, edges, graph, layers)
            if move is None:
                continue
            joined = joined_part(part, [edges.pop(child) for child in dict.fromkeys(move.joined)])
            edges[move.after] = joined._replace(axis=move.axis)
            moved = True
            if operation(move.after[0]) in TRANSPOSITIONS and move.axis == part.axis:
                transposed.append(f"{part.name!r} from {edge_shape(edge)} to {edge_shape(move.after)}")
    return edges, transposed


class _Move(NamedTuple):
    """The edge one step nearer the loss, the edges that it is made of, and which dimension counts its samples."""

    after: Edge
    joined: Sequence[Edge]
    axis: int


def _next_move(edge: Edge, edges: Mapping[Edge, Part], graph: LossGraph, layers: Layers) -> _Move | None:
    """Over one operation, if what follows belongs to the model and holds the same numbers."""
    users = graph.consumers.get(edge, [])
    if len(users) != 1:
        return None
    node, position = users[0]
    axis = edges[edge].axis
    if operation(node) in _HANDED_THROUGH:
        after = _handed_through(node, position)
        return None if after is None or after not in graph.consumers else _Move(after, [edge], axis)
    after = (node, 0)
    if after not in graph.consumers or not edge_shape(after):
        return None  # the loss itself, or no longer a batch
    if operation(node) in _JOINS:
        return _join(after, edges, graph)
    if edge_shape(after) == edge_shape(edge) and layers.is_bias(node, position):
        return _Move(after, [edge], axis)
    if _same_numbers(node, edge, after):
        axis = _axis_of_view(edge, after, edges[edge], graph, layers)
        return None if axis is None else _Move(after, [edge], axis)
    return _sum_of_outputs(edge, edges, graph)


def _join(after: Edge, edges: Mapping[Edge, Part], graph: LossGraph) -> _Move | None:
    """Over a stack or a concatenation of outputs that nothing else uses."""
    node = after[0]
    inputs = list(children(node))
    if len(inputs) < len(node.next_functions) or any(i not in edges or len(graph.consumers[i]) != 1 for i in inputs):
        return None
    parts = [edges[i] for i in inputs]
    axis = parts[0].axis
    if any(part.axis != axis for part in parts):
        return None
    if operation(node) == "Stack":
        new = stacking_dimension(after)
        if new is None:
            return None
        if axis == ONE_SAMPLE:
            axis = new
        elif new <= axis and (axis > 0 or _of_several_layers(parts)):
            axis += 1
        # The calls of one layer may be samples, each with a batch of its own: lists, say. The first dimension counts.
    return _Move(after, inputs, axis)


def _of_several_layers(parts: Sequence[Part]) -> bool:
    """Whether all these outputs are those of different layers."""
    known = {part.layer for part in parts if part.layer is not None}
    return len(parts) > 1 and len(known) == len(parts)


def _axis_of_view(edge: Edge, after: Edge, part: Part, graph: LossGraph, layers: Layers) -> int | None:
    """The dimension that counts the samples after a view or a transposition; None: the boundary stays before it."""
    node, axis = after[0], part.axis
    new = axis_after(node, axis, edge_shape(edge), edge_shape(after))
    if operation(node) not in TRANSPOSITIONS or axis != 0 or new == 0:
        return new
    # A transposition that moves the samples may belong to the loss (CTC wants time first): the edge stays before it.
    # After a recurrent layer it belongs to the layer, which transposes to batch-first itself; so it does after a stack
    # of what one layer made of each time step, and before a bias.
    if _is_recurrent(edge[0]):
        return 0
    if (
        len(edge_shape(edge)) > 2
        and stacking_dimension(edge) == 0
        and axis_after(node, 1, edge_shape(edge), edge_shape(after)) == 0
    ):
        return 0
    return new if _bias_follows(after, graph, layers) else None


def _bias_follows(edge: Edge, graph: LossGraph, layers: Layers) -> bool:
    """Whether a bias is added to the tensor, or to a view of it."""
    while True:
        users = graph.consumers.get(edge, [])
        if len(users) != 1:
            return False
        node, position = users[0]
        after = (node, 0)
        if after not in graph.consumers:
            return False
        if layers.is_bias(node, position):
            return edge_shape(after) == edge_shape(edge)
        if not _same_numbers(node, edge, after):
            return False
        edge = after


def _sum_of_outputs(edge: Edge, edges: Mapping[Edge, Part], graph: LossGraph) -> _Move | None:
    """The sum of this edge and another one, each perhaps times a constant: an adapter's, a residual connection's."""
    top = edge
    while True:
        users = graph.consumers.get(top, [])
        if len(users) != 1:
            return None
        node, position = users[0]
        after = (node, 0)
        if after not in graph.consumers or edge_shape(after) != edge_shape(edge):
            return None
        inputs = node.next_functions
        if operation(node) == "Add" and len(inputs) == 2 and all(child is not None for child, _ in inputs):
            other = _below_scaling(inputs[1 - position], edges, graph)  # type: ignore[arg-type]
            if other is None or other == edge or edge_shape(other) != edge_shape(edge):
                return None
            this, that = edges[edge], edges[other]
            # Two calls of one layer are two sets of samples, not two parts of one output.
            if this.axis != that.axis or (this.layer and that.layer and not this.layer.isdisjoint(that.layer)):
                return None
            return _Move(after, [edge, other], this.axis)
        if not _is_scaling(node):
            return None
        top = after


def _below_scaling(edge: Edge, edges: Mapping[Edge, Part], graph: LossGraph) -> Edge | None:
    """The known edge that ``edge`` is a constant times of; None if there is none, or it has other uses."""
    while len(graph.consumers.get(edge, ())) == 1:
        if edge in edges:
            return edge
        if not _is_scaling(edge[0]):
            return None
        edge = next(children(edge[0]))
    return None


def _is_scaling(node: Node) -> bool:
    """Whether the operation multiplies its only input that requires grad by one number, or drops some of it."""
    inputs = node.next_functions
    if operation(node) not in _SCALINGS or inputs[0][0] is None or len(list(children(node))) != 1:
        return False
    factor = getattr(node, "_saved_other", None)
    return factor is None or factor.ndim == 0


def _same_numbers(node: Node, edge: Edge, after: Edge) -> bool:
    """Whether the operation ``node``, from ``edge`` to ``after``, changes no number and belongs to the model."""
    if operation(node) == "ViewAsReal":
        return True
    if operation(node) in _SAME_NUMBERS and len(list(children(node))) == 1:
        return math.prod(edge_shape(after)) == math.prod(edge_shape(edge))
    return False


def _handed_through(node: Node, position: int) -> Edge | None:
    """The output that equals the input at ``position``, of an operation that hands on all outputs of a model together.

    Its inputs are the tensors; its outputs are the same tensors in the same order, and numbers, which have no shape.
    """
    inputs = [k for k, edge in enumerate(node.next_functions) if edge[0] is None or edge_shape(edge)]  # type: ignore[arg-type]
    outputs = [k for k, meta in enumerate(node._input_metadata) if tuple(meta.shape)]
    if position not in inputs or len(inputs) != len(outputs):
        return None
    return node, outputs[inputs.index(position)]


def _is_recurrent(node: Node) -> bool:
    return any(word in operation(node).lower() for word in ("rnn", "lstm", "gru"))
