"""Where outputs meet the loss, read off the autograd graph: the first operations, seen from the loss, that own
parameters. Everything parameter-free after them is the loss. Nothing to configure.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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

__all__ = ["GraphCut"]

# Operations whose output holds the same numbers as their input: the loss may as well begin after them.
_SAME_NUMBERS = frozenset(("Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze")) | {
    *("T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View")
}
_PRODUCTS = frozenset(("Mm", "Bmm", "Mv"))
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
_TRANSPOSITIONS = frozenset(("Permute", "T", "Transpose"))
# Around what a model or a layer returns, and a part of it: DDP's, whose backward says that the backward pass has
# begun, and torch's own for module backward hooks, which belong below the loss.
_HANDED_THROUGH = frozenset(("_DDPSink", "BackwardHookFunction"))
_JOINS = frozenset(["Cat", "Stack"])

# Operations that mix parameters with data, or pick from parameters by data, however the shapes look.
_LAYERS = (
    *("mm", "mv", "conv", "batchnorm", "layernorm", "groupnorm", "rmsnorm", "rnn", "lstm", "gru", "attention"),
    *("embedding", "index", "gather", "compiledfunction"),
)


class GraphCut:
    """The boundary by the autograd graph alone.

    Views, casts and the stacking of several outputs after the last layer belong to the model: the boundary has the
    shape that the loss sees. Terms that depend on parameters only (weight decay written into the loss) are not
    outputs and are left alone.
    """

    def __init__(self) -> None:
        self._names: dict[int, str] = {}

    def attach(self, module: nn.Module) -> None:
        """Take the names of ``module``'s parameters, for messages and states."""
        self._names = {id(p): _unwrapped(name) for name, p in module.named_parameters()}

    def detach(self) -> None:
        """Forget them."""
        self._names = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Nothing to watch."""
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
            # Parameters all the way up: outputs that are themselves the one thing being optimised.
            leaves = explore(root, lambda edge: is_leaf(edge[0]))
            if len(leaves.stops) == 1 and edge_shape(leaves.stops[0]):
                graph = leaves
                named = {leaves.stops[0]: self._names.get(id(_variable(leaves.stops[0][0])), "leaf")}
            else:
                return Cut([], seen=describe(leaves))
        turned: list[str] = []
        edges = _towards_loss(named, graph, turned)
        already = _edges_below(graph.preconditioned, stop, skip)
        cut = boundaries_at(edges, graph, already)
        cut.turned = turned
        if any(operation(n) == "CompiledFunction" and _owns_parameters(n, kinds) for n in graph.nodes):
            cut.dropped.append("what torch.compile has made one operation of, network and loss together")
        return cut

    def _name(self, edge: Edge, kinds: dict[Node, bool], number: int) -> str:
        """The layer that owns the boundary: "head.weight" -> "head"; of a compiled network the last one."""
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
    """The name without what torch.compile, FSDP and checkpointing put in: a state fits the model with and without."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _variable(leaf: Node) -> Tensor:
    return leaf.variable  # type: ignore[attr-defined]


def _parameter_only(node: Node, known: dict[Node, bool]) -> bool:
    """Whether a tensor was computed from parameters and constants alone: a transposed weight, a weight norm,
    a penalty; not what a layer made of parameters and data (which do not require grad, like constants).

    Depth first, without recursion (graphs are deeper than Python's stack). One ancestor that saw data settles
    everything computed from it, and a layer always has: a walk ends at the first one it meets.
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
    """Operations that stand for a layer applied to data; a bare matrix product may also be of two parameters."""
    return _is_layer_name(node.name())


@functools.cache
def _is_layer_name(name: str) -> bool:
    return any(word in name.lower() for word in _LAYERS) and name.split("Backward")[0] not in _PRODUCTS


def _made_of_parameters(node: Node) -> bool:
    """The same for one node, all of whose inputs that require grad are made of parameters."""
    inputs = list(children(node))
    if not inputs:
        return False
    if all(child is not None for child, _ in node.next_functions):
        return True
    if operation(node) in _PRODUCTS:
        return False  # the other factor is data
    try:
        return edge_shape((node, 0)) == torch.broadcast_shapes(*(edge_shape(edge) for edge in inputs))
    except RuntimeError:  # they do not broadcast
        return False


def _owns_parameters(node: Node, known: dict[Node, bool]) -> bool:
    if is_leaf(node):
        return False
    for child, _ in node.next_functions:
        if child is not None:
            own = known.get(child)
            if own or (own is None and _parameter_only(child, known)):
                return True
    return False


def _towards_loss(named: Mapping[Edge, str], graph: LossGraph, turned: list[str]) -> dict[Edge, str]:
    """Move each edge over the operations that only reshape, cast, or stack it with other edges; note in ``turned``
    where features changed places, as no graph tells whether the model or the loss wanted that."""
    edges = dict(named)
    # A loss that brings its own Hessian says where it begins.
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
                turned.append(f"{name!r} from {edge_shape(edge)} to {edge_shape(after)}")
    return edges


def _next_edge(edge: Edge, edges: Mapping[Edge, str], graph: LossGraph) -> tuple[Edge | None, Sequence[Edge]]:
    """The edge one operation nearer the loss that holds the same numbers, and all the edges it holds."""
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
    if operation(node) in _SAME_NUMBERS and len(list(children(node))) == 1:
        if math.prod(edge_shape(after)) != math.prod(edge_shape(edge)):
            return False
        # A transposition may be the loss's own (time first for CTC): the samples stay where they are. Recurrent
        # layers are the exception: they transpose to batch-first themselves.
        moves_samples = operation(node) in _TRANSPOSITIONS and edge_shape(after)[0] != edge_shape(edge)[0]
        return not moves_samples or _is_recurrent(edge[0])
    return False


def _handed_through(node: Node, position: int) -> Edge | None:
    """The output that is the input at ``position``, where all tensors of a model's output pass one operation.

    Inputs and outputs are the same list, but that inputs count tensors only; numbers among the outputs have no shape.
    """
    inputs = [k for k, edge in enumerate(node.next_functions) if edge[0] is None or edge_shape(edge)]  # type: ignore[arg-type]
    outputs = [k for k, meta in enumerate(node._input_metadata) if tuple(meta.shape)]
    if position not in inputs or len(inputs) != len(outputs):
        return None
    return node, outputs[inputs.index(position)]


def _edges_below(roots: Sequence[Node], stop: Callable[[Edge], bool], skip: Callable[[Node], bool]) -> int:
    """How many boundaries are reached through losses that already carry a step."""
    return sum(len(explore(root, stop, skip).stops) for root in roots)


def _is_recurrent(node: Node) -> bool:
    return any(word in operation(node).lower() for word in ("rnn", "lstm", "gru"))
