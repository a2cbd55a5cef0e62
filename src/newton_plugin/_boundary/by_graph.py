"""``boundary="auto"``: where outputs meet the loss, read off the autograd graph.

Walking from the loss towards the inputs, the first operations that apply parameters as weights to data are the model's
last layers (``layers.py`` says which those are). What they return are the outputs; the operations after them are the
loss, whether or not parameters enter there element by element: a temperature, a log-variance, a loss weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.autograd.graph import Node

from newton_plugin._boundary.autograd_graph import (
    Edge,
    LossGraph,
    children,
    edge_shape,
    explore,
    is_leaf,
    known_hessian,
    operation,
)
from newton_plugin._boundary.finder import Cut, boundaries_at, describe
from newton_plugin._boundary.layers import Layers
from newton_plugin._boundary.opaque import hides_parameters, is_scripted

__all__ = ["GraphFinder"]

# Operations whose output holds the same numbers as their input. They belong to the model; the loss begins after them.
_SAME_NUMBERS = frozenset(("Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze")) | {
    *("T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View")
}
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_TRANSPOSITIONS = frozenset(("Permute", "T", "Transpose"))
# Operations that hand on what a model or a layer returned, and belong to it: DDP's tells it that the backward pass has
# begun, torch's own calls the backward hooks of a module.
_HANDED_THROUGH = frozenset(("_DDPSink", "BackwardHookFunction"))
_JOINS = frozenset(["Cat", "Stack"])
_REDUCTIONS = frozenset(("Div", "Mean", "Mul", "Neg", "Squeeze", "Sum", "View"))
_SCALINGS = frozenset(("Div", "Mul", "NativeDropout"))  # by a constant, on the way to a sum of outputs


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
        self._names = {id(p): _unwrapped(name) for name, p in module.named_parameters()}

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
        graph = explore(
            root, lambda edge: layers.ends_here(edge[0]) and bool(edge_shape(edge)), skip=layers.is_parameter
        )
        # Beside a layer, what is picked from a parameter by index is a part of the loss: transition scores, say.
        outputs = [edge for edge in graph.stops if not layers.is_lookup(edge[0])] or graph.stops
        named = {edge: self._name(edge, layers, k) for k, edge in enumerate(outputs)}
        if not named and not graph.preconditioned:
            # No layer. If the loss depends on one leaf, the outputs themselves are what is optimised.
            leaves = explore(root, lambda edge: is_leaf(edge[0]))
            if len(leaves.stops) == 1 and edge_shape(leaves.stops[0]):
                graph = leaves
                named = {leaves.stops[0]: self._names.get(id(_variable(leaves.stops[0][0])), "leaf")}
            else:
                return Cut([], description=describe(leaves))
        edges, transposed = _towards_loss(named, graph, layers)
        cut = boundaries_at(edges, graph)
        cut.transposed = transposed
        cut.hidden = [node.name() for node in graph.nodes if hides_parameters(node) or is_scripted(node)]
        if all(operation(node) in _REDUCTIONS for node in graph.nodes):
            # The loss only adds up what a script returned: it has been computed inside.
            cut.hidden += [edge[0].name() for edge in graph.stops if is_scripted(edge[0])]
        if any(operation(n) == "CompiledFunction" and layers.owns_parameters(n) for n in graph.nodes):
            cut.left_out.append("what torch.compile has made one operation of, network and loss together")
        return cut

    def _name(self, edge: Edge, layers: Layers, number: int) -> str:
        """The layer that owns the boundary: "head" for the parameter "head.weight"; of a compiled network the last."""
        inputs = list(children(edge[0]))
        for child, _ in reversed(inputs) if operation(edge[0]) == "CompiledFunction" else inputs:
            if layers.is_parameter(child):
                leaf = child
                while not is_leaf(leaf):
                    leaf = next(children(leaf))[0]
                parameter = self._names.get(id(_variable(leaf)))
                if parameter is not None:
                    return parameter.rpartition(".")[0] or parameter
        return f"output{number}"


def _unwrapped(name: str) -> str:
    """The name without the parts that torch.compile, FSDP and checkpointing insert: a state fits with and without."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _variable(leaf: Node) -> Tensor:
    return leaf.variable  # type: ignore[attr-defined]


def _towards_loss(named: Mapping[Edge, str], graph: LossGraph, layers: Layers) -> tuple[dict[Edge, str], list[str]]:
    """Move each edge towards the loss, over operations that reshape it, cast it, add a bias or join it with others.

    Returns:
        The edges that were reached, with their names; in words, those whose features were transposed on the way (the
        graph does not tell whether the model or the loss wanted that).
    """
    edges, transposed = dict(named), []
    # A loss that brings its own Hessian begins at the edge that it names: an edge is not moved beyond that.
    pinned = {known[0] for known in map(known_hessian, graph.nodes) if known is not None}
    moved = True
    while moved:
        moved = False
        for edge, name in list(edges.items()):
            stays = edge in pinned or edge not in edges
            after, joined = (None, ()) if stays else _next_edge(edge, edges, graph, layers)
            if after is None:
                continue
            for child in joined:
                edges.pop(child, None)
            edges[after] = name
            moved = True
            if operation(after[0]) in _TRANSPOSITIONS and edge_shape(after)[0] == edge_shape(edge)[0]:
                transposed.append(f"{name!r} from {edge_shape(edge)} to {edge_shape(after)}")
    return edges, transposed


def _next_edge(
    edge: Edge, edges: Mapping[Edge, str], graph: LossGraph, layers: Layers
) -> tuple[Edge | None, Sequence[Edge]]:
    """The edge one operation nearer the loss, if it holds the same numbers, and all the edges that it is made of."""
    users = graph.consumers.get(edge, [])
    if len(users) != 1:
        return None, ()
    node, position = users[0]
    if operation(node) in _HANDED_THROUGH:
        after = _handed_through(node, position)
        return (after if after in graph.consumers else None), [edge]
    after = (node, 0)
    if after not in graph.consumers or not edge_shape(after):
        return None, ()  # the loss itself, or no longer a batch
    inputs = list(children(node))
    if operation(node) in _JOINS:
        whole = len(inputs) == len(node.next_functions) and all(
            i in edges and len(graph.consumers[i]) == 1 for i in inputs
        )
        return (after if whole else None), inputs
    if _same_numbers(node, edge, after) or (edge_shape(after) == edge_shape(edge) and layers.is_bias(node, position)):
        return after, [edge]
    return _sum_of_outputs(edge, edges, graph, layers)


def _sum_of_outputs(
    edge: Edge, edges: Mapping[Edge, str], graph: LossGraph, layers: Layers
) -> tuple[Edge | None, Sequence[Edge]]:
    """The sum of this edge and another one, each perhaps times a constant: an adapter's, a residual connection's."""
    top = edge
    while True:
        users = graph.consumers.get(top, [])
        if len(users) != 1:
            return None, ()
        node, position = users[0]
        after = (node, 0)
        if after not in graph.consumers or edge_shape(after) != edge_shape(edge):
            return None, ()
        inputs = node.next_functions
        if operation(node) == "Add" and len(inputs) == 2 and all(child is not None for child, _ in inputs):
            other = _below_scaling(inputs[1 - position], edges, graph)  # type: ignore[arg-type]
            if other is None or other == edge or edge_shape(other) != edge_shape(edge):
                return None, ()
            # Two calls of one layer are two sets of samples, not two parts of one output.
            shared = layers.parameters_of(edge[0]) & layers.parameters_of(other[0])
            return (None, ()) if shared else (after, [edge, other])
        if not _is_scaling(node):
            return None, ()
        top = after


def _below_scaling(edge: Edge, edges: Mapping[Edge, str], graph: LossGraph) -> Edge | None:
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
        if math.prod(edge_shape(after)) != math.prod(edge_shape(edge)):
            return False
        # A transposition that moves the samples may belong to the loss (CTC wants time first): the edge stays before
        # it. After a recurrent layer it belongs to the layer, which transposes to batch-first itself.
        moves_samples = operation(node) in _TRANSPOSITIONS and edge_shape(after)[0] != edge_shape(edge)[0]
        return not moves_samples or _is_recurrent(edge[0])
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
