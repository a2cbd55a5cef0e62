"""Reading PyTorch's autograd graph: nodes, edges and what can be known of them without running anything.

An *edge* (node, index) is one tensor of the forward pass, seen from behind: the index-th output of the
operation whose backward is ``node``. The *consumers* of an edge are the operations that used the tensor.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

__all__ = [
    "Boundary",
    "Consumers",
    "Edge",
    "LossGraph",
    "children",
    "differentiable_once",
    "edge_shape",
    "elements_between",
    "explore",
    "is_leaf",
    "is_output_of_fsdp1",
    "is_preconditioned",
    "known_hessian",
    "make_boundary",
    "mark_hessian",
    "mark_preconditioned",
    "on_one_path",
    "operation",
    "preconditioned_edges",
    "upstream_edges",
]

Edge = tuple[Node, int]
Consumers = dict[Edge, list[tuple[Node, int]]]

_MARK = "newton_plugin"
_HESSIAN = "newton_plugin_hessian"


@dataclass(frozen=True)
class Boundary:
    """Where a tensor of outputs meets the loss.

    Attributes:
        name: what the user would call it.
        edge: the outputs, as an input for ``torch.autograd.grad``.
        shape, dtype, device: of the outputs.
        consumers: the operations of the loss that use the outputs, each with the positions among its inputs.
        certain: whether each consumer is certain to send a gradient in every backward pass that reaches the outputs.
    """

    name: str
    edge: GradientEdge
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    consumers: tuple[tuple[Node, tuple[int, ...]], ...]
    certain: bool


@dataclass
class LossGraph:
    """The part of the graph between a loss and the places where a walk stopped.

    Attributes:
        consumers: of every edge seen.
        stops: edges where the walk stopped, in the order met.
        preconditioned: nodes inside that already carry a Newton step of their own.
        nodes: every node walked through, in order, the loss's own first.
    """

    consumers: Consumers = field(default_factory=dict)
    stops: list[Edge] = field(default_factory=list)
    preconditioned: list[Node] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)


def operation(node: Node) -> str:
    """The name of the operation: "AddmmBackward0" -> "Addmm"."""
    return _short(node.name())


@functools.cache
def _short(name: str) -> str:
    return re.sub(r"Backward\d*$", "", name.rsplit("::", 1)[-1])


def is_leaf(node: Node) -> bool:
    """Whether the node stands for a leaf tensor: a parameter, or an input that requires grad."""
    return hasattr(node, "variable")


def children(node: Node) -> Iterator[Edge]:
    """The edges of the inputs that require grad."""
    for child, index in node.next_functions:
        if child is not None:
            yield child, index


def edge_metadata(edge: Edge) -> Any:
    """Shape, dtype and device of the tensor behind an edge."""
    node, index = edge
    return node.variable if is_leaf(node) else node._input_metadata[index]  # type: ignore[attr-defined]


def edge_shape(edge: Edge) -> tuple[int, ...]:
    """The shape of the tensor behind an edge."""
    return tuple(edge_metadata(edge).shape)


def explore(root: Node, stop: Callable[[Edge], bool], skip: Callable[[Node], bool] | None = None) -> LossGraph:
    """Walk from the loss towards its inputs, not beyond ``stop`` edges nor into ``skip`` nodes."""
    graph = LossGraph(nodes=[root])
    visited, stopped = {root}, set()
    for node in graph.nodes:  # grows while walked
        for position, (child, index) in enumerate(node.next_functions):
            if child is None or (skip is not None and skip(child)):
                continue
            edge = (child, index)
            graph.consumers.setdefault(edge, []).append((node, position))
            if edge in stopped:
                continue
            if stop(edge):
                stopped.add(edge)
                graph.stops.append(edge)
            elif child not in visited:
                visited.add(child)
                if is_preconditioned(child):
                    graph.preconditioned.append(child)
                else:
                    graph.nodes.append(child)
    return graph


def upstream_edges(start: Edge, wanted: Iterable[Edge]) -> set[Edge]:
    """Those of ``wanted`` that ``start`` was computed from."""
    wanted = set(wanted)
    # A node is younger than everything it was computed from: nothing older than the oldest wanted matters.
    oldest = min((node._sequence_nr() for node, _ in wanted if not is_leaf(node)), default=0)
    found: set[Edge] = set()
    visited, stack = {start[0]}, [start[0]]
    while stack:
        for edge in children(stack.pop()):
            if edge in wanted:
                found.add(edge)
            node = edge[0]
            if node not in visited and not is_leaf(node) and node._sequence_nr() >= oldest:
                visited.add(node)
                stack.append(node)
    return found


def make_boundary(name: str, edge: Edge, graph: LossGraph) -> Boundary:
    """Gather what is known of an edge."""
    metadata = edge_metadata(edge)
    grouped: dict[Node, list[int]] = {}
    for node, position in graph.consumers.get(edge, ()):
        grouped.setdefault(node, []).append(position)
    return Boundary(
        name,
        GradientEdge(*edge),
        tuple(metadata.shape),
        metadata.dtype,
        torch.device(metadata.device),
        tuple((node, tuple(positions)) for node, positions in grouped.items()),
        len(grouped) == 1 or all(_always_sends(node.name()) for node in graph.nodes),
    )


@functools.cache
def _always_sends(name: str) -> bool:
    """Torch's own operations do; a Function of the user's, and torch's second derivatives, may send None."""
    return name[-1:].isdigit() and "BackwardBackward" not in name


def is_output_of_fsdp1(edge: Edge) -> bool:
    """Whether the tensor left a layer of torch's first FSDP and nothing has been done to it since.

    That wrapper puts a hook on what it returns, which gathers the parameters for the backward pass and lets them go at
    its end; a pass that ends at this very tensor lets them go before the pass that needs them.
    """
    layer = edge[0]
    nearby = [layer]
    for _ in range(4):  # the layer, a view, the split, the flat parameter
        nearby = [child for node in nearby if not is_leaf(node) for child, _ in children(node)]
        if any(is_leaf(node) and getattr(node.variable, "_is_flat_param", False) for node in nearby):  # type: ignore[attr-defined]
            return operation(layer) != "Clone"
    return False


def differentiable_once(gradient: Tensor) -> bool:
    """Whether the graph of a gradient holds a node that raises when differentiated, as ``once_differentiable`` leaves.

    Autograd drops such a branch without raising where nothing else leads from it to the outputs: a silent zero.
    """
    return gradient.grad_fn is not None and any(
        node.name() == "torch::autograd::Error" for node in explore(gradient.grad_fn, lambda edge: False).nodes
    )


def elements_between(gradient: Tensor, edge: Edge) -> int:
    """How many numbers one vector makes on its way back from a gradient to the outputs behind ``edge``."""
    if gradient.grad_fn is None:
        return 0
    nodes = explore(gradient.grad_fn, edge.__eq__).nodes
    return sum(math.prod(tensor.shape) for node in nodes if not is_leaf(node) for tensor in node._input_metadata)  # type: ignore[attr-defined]


def mark_preconditioned(node: Node, edges: Iterable[Edge]) -> None:
    """Note on a loss's node where its gradient is the surrogate's, so that no second step is taken there."""
    _metadata(node)[_MARK] = preconditioned_edges(node).union(edges)


def preconditioned_edges(node: Node) -> frozenset[Edge]:
    """What :func:`mark_preconditioned` has noted."""
    return _metadata(node).get(_MARK, frozenset())


def is_preconditioned(node: Node) -> bool:
    """Whether :func:`mark_preconditioned` was here."""
    return bool(preconditioned_edges(node))


def mark_hessian(node: Node, edge: Edge, blocks: Callable[[], Tensor]) -> None:
    """Note on a loss's node that ``blocks()`` is its Hessian with respect to the tensor behind ``edge``."""
    _metadata(node)[_HESSIAN] = (edge, blocks)


def known_hessian(node: Node) -> tuple[Edge, Callable[[], Tensor]] | None:
    """What :func:`mark_hessian` has noted."""
    return _metadata(node).get(_HESSIAN)


def on_one_path(edge: Edge, others: Iterable[Edge]) -> bool:
    """Whether ``edge`` is one of the others, or one of them was computed from the other."""
    others = set(others)
    return edge in others or bool(upstream_edges(edge, others)) or any(upstream_edges(o, [edge]) for o in others)


def _metadata(node: Node) -> dict[str, Any]:
    return node.metadata  # type: ignore[return-value]  # a property that torch annotates as a method
