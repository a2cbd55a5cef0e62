"""``boundary="auto"``: where outputs meet the loss, read off the autograd graph.

Walking from the loss towards the inputs, the first operations that own parameters are the model's last layers. What
they return are the outputs; the operations after them, which own no parameters, are the loss.

Two questions are asked of each node. Does it *own parameters*, that is, does it apply a parameter to data? Then it is a
layer, and the walk stops. Was it computed from *parameters only* (a transposed weight, weight decay)? Then it is no
output, and the walk passes it over.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
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

__all__ = ["GraphFinder"]

# Operations whose output holds the same numbers as their input. They belong to the model; the loss begins after them.
_SAME_NUMBERS = frozenset(("Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze")) | {
    *("T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View")
}
_PRODUCTS = frozenset(("Mm", "Bmm", "Mv"))
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_TRANSPOSITIONS = frozenset(("Permute", "T", "Transpose"))
# Operations that hand on what a model or a layer returned, and belong to it: DDP's tells it that the backward pass has
# begun, torch's own calls the backward hooks of a module.
_HANDED_THROUGH = frozenset(("_DDPSink", "BackwardHookFunction"))
_JOINS = frozenset(["Cat", "Stack"])

# Parts of the names of operations that apply parameters to data, or pick from parameters by data, whatever the shapes.
_LAYERS = (
    *("mm", "mv", "conv", "batchnorm", "layernorm", "groupnorm", "rmsnorm", "rnn", "lstm", "gru", "attention"),
    *("embedding", "index", "gather", "compiledfunction"),
)


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
        kinds: dict[Node, bool] = {}

        def skip(node: Node) -> bool:
            known = kinds.get(node)
            return _parameter_only(node, kinds) if known is None else known

        def stop(edge: Edge) -> bool:
            return _owns_parameters(edge[0], kinds) and len(edge_shape(edge)) > 0

        graph = explore(root, stop, skip)
        named = {edge: self._name(edge, kinds, k) for k, edge in enumerate(graph.stops)}
        if not named and not graph.preconditioned:
            # No layer. If the loss depends on one leaf, the outputs themselves are what is optimised.
            leaves = explore(root, lambda edge: is_leaf(edge[0]))
            if len(leaves.stops) == 1 and edge_shape(leaves.stops[0]):
                graph = leaves
                named = {leaves.stops[0]: self._names.get(id(_variable(leaves.stops[0][0])), "leaf")}
            else:
                return Cut([], description=describe(leaves))
        edges, transposed = _towards_loss(named, graph)
        cut = boundaries_at(edges, graph)
        cut.transposed = transposed
        if any(operation(n) == "CompiledFunction" and _owns_parameters(n, kinds) for n in graph.nodes):
            cut.left_out.append("what torch.compile has made one operation of, network and loss together")
        return cut

    def _name(self, edge: Edge, kinds: dict[Node, bool], number: int) -> str:
        """The layer that owns the boundary: "head" for the parameter "head.weight"; of a compiled network the last."""
        inputs = list(children(edge[0]))
        for child, _ in reversed(inputs) if operation(edge[0]) == "CompiledFunction" else inputs:
            if _parameter_only(child, kinds):
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


def _parameter_only(node: Node, known: dict[Node, bool]) -> bool:
    """Whether a tensor was computed from parameters and constants alone: a transposed weight, a weight norm, a penalty.

    What a layer made of parameters and data was not, although data, like a constant, does not require grad.

    The walk goes depth first and without recursion, as graphs are deeper than Python's stack. The answer for one layer
    is no, and so it is for every node computed from it: the walk ends at the first layer it meets.

    Args:
        node: of the tensor.
        known: the answers so far; new ones are added.
    """
    if node in known:
        return known[node]
    if is_leaf(node) or _is_layer(node):  # nearly always
        known[node] = is_leaf(node)
        return known[node]
    stack = [(node, children(node))]
    while stack:
        current, rest = stack[-1]
        verdict = None
        if current not in known and (is_leaf(current) or _is_layer(current)):
            verdict = is_leaf(current)
        else:
            child = next((c for c, _ in rest if not known.get(c, False)), None)
            if child is None:
                verdict = _made_of_parameters(current)
            elif child in known:
                verdict = False
            else:
                stack.append((child, children(child)))
        if verdict is not None:
            known[current] = verdict
            stack.pop()
            if not verdict:
                known.update((user, False) for user, _ in stack)
                stack.clear()
    return known[node]


def _is_layer(node: Node) -> bool:
    """Whether the operation is a layer applied to data. A bare matrix product is not certain: both factors may be
    parameters."""
    return _is_layer_name(node.name())


@functools.cache
def _is_layer_name(name: str) -> bool:
    return any(word in name.lower() for word in _LAYERS) and name.split("Backward")[0] not in _PRODUCTS


def _made_of_parameters(node: Node) -> bool:
    """:func:`_parameter_only` for a node whose inputs that require grad were all computed from parameters alone."""
    inputs = list(children(node))
    if not inputs:
        return False
    if all(child is not None for child, _ in node.next_functions):
        return True
    if operation(node) in _PRODUCTS:
        return False  # the other factor requires no grad: it is data
    try:
        return edge_shape((node, 0)) == torch.broadcast_shapes(*(edge_shape(edge) for edge in inputs))
    except RuntimeError:  # they do not broadcast
        return False


def _owns_parameters(node: Node, known: dict[Node, bool]) -> bool:
    """Whether an input of the operation is a parameter, or was computed from parameters only."""
    if is_leaf(node):
        return False
    for child, _ in node.next_functions:
        if child is not None:
            own = known.get(child)
            if own or (own is None and _parameter_only(child, known)):
                return True
    return False


def _towards_loss(named: Mapping[Edge, str], graph: LossGraph) -> tuple[dict[Edge, str], list[str]]:
    """Move each edge towards the loss, over operations that only reshape it, cast it or stack it with other edges.

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
            after, joined = (None, ()) if stays else _next_edge(edge, edges, graph)
            if after is None:
                continue
            for child in joined:
                edges.pop(child, None)
            edges[after] = name
            moved = True
            if operation(after[0]) in _TRANSPOSITIONS and edge_shape(after)[0] == edge_shape(edge)[0]:
                transposed.append(f"{name!r} from {edge_shape(edge)} to {edge_shape(after)}")
    return edges, transposed


def _next_edge(edge: Edge, edges: Mapping[Edge, str], graph: LossGraph) -> tuple[Edge | None, Sequence[Edge]]:
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
    return (after if _same_numbers(node, edge, after) else None), [edge]


def _same_numbers(node: Node, edge: Edge, after: Edge) -> bool:
    """Whether the operation ``node``, from ``edge`` to ``after``, changes no number and belongs to the model."""
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
