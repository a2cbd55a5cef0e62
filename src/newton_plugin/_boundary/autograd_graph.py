"""PyTorch's autograd graph: nodes, edges, and what they tell without running anything.

An *edge* (node, index) stands for one tensor of the forward pass: the index-th output of the operation whose backward
is ``node``. The *consumers* of an edge are the operations that used the tensor.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from newton_plugin._boundary.marks import (
    is_preconditioned,
    known_hessian,
    mark_hessian,
    mark_preconditioned,
    preconditioned_edges,
)
from newton_plugin._errors import PADDED, ArgumentTypeError, as_real

__all__ = [
    "Boundary",
    "Consumers",
    "Edge",
    "LossGraph",
    "children",
    "differentiable_once",
    "edge_of",
    "edge_shape",
    "elements_between",
    "explore",
    "is_leaf",
    "is_output_of_fsdp1",
    "is_preconditioned",
    "known_hessian",
    "lowest_number",
    "make_boundary",
    "mark_hessian",
    "mark_preconditioned",
    "operation",
    "preconditioned_edges",
    "reduction_of",
    "upstream_edges",
]

Edge = tuple[Node, int]
Consumers = dict[Edge, list[tuple[Node, int]]]


@dataclass(frozen=True)
class Boundary:
    """Where a tensor of outputs meets the loss.

    Attributes:
        name: the layer, the argument or the name that the user gave.
        edge: the outputs, as an input for ``torch.autograd.grad``.
        shape, dtype, device: of the outputs.
        consumers: the operations of the loss that use the outputs; for each, at which positions among its inputs.
        certain: whether every consumer sends a gradient in every backward pass that reaches the outputs.
        features: which dimensions are features, where the graph tells; None: all but the first.
        layer: what two calls of one layer have in common, and no other layer has; None: not known.
    """

    name: str
    edge: GradientEdge
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    consumers: tuple[tuple[Node, tuple[int, ...]], ...]
    certain: bool
    features: tuple[int, ...] | None = None
    layer: Hashable | None = None

    @property
    def graph_edge(self) -> Edge:
        """The outputs as (node, index), which is how the functions of this module name a tensor."""
        return self.edge.node, self.edge.output_nr


@dataclass
class LossGraph:
    """The part of the graph between a loss and the edges at which :func:`explore` stopped.

    Attributes:
        consumers: of every edge that was met.
        stops: the edges at which the walk stopped, in the order in which they were met.
        preconditioned: nodes of losses inside this loss that already take a Newton step; the walk ends there, too.
        nodes: every node that was walked through, in order, the loss's own first.
        skipped: the edges whose node was passed over, with the operations that use them.
    """

    consumers: Consumers = field(default_factory=dict)
    stops: list[Edge] = field(default_factory=list)
    preconditioned: list[Node] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    skipped: Consumers = field(default_factory=dict)


def edge_of(tensor: Tensor) -> Edge:
    """The edge of a tensor that requires grad."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


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
    """An object with the shape, dtype and device of the tensor that an edge stands for."""
    node, index = edge
    return node.variable if is_leaf(node) else node._input_metadata[index]  # type: ignore[attr-defined]


def edge_shape(edge: Edge) -> tuple[int, ...]:
    """The shape of the tensor that an edge stands for.

    Raises:
        ArgumentTypeError: a nested tensor, which has no rows of equal length.
    """
    node, index = edge
    if is_leaf(node):
        metadata: Any = node.variable  # type: ignore[attr-defined]
        nested = metadata.is_nested
    else:
        metadata = node._input_metadata[index]  # type: ignore[attr-defined]
        nested = metadata.is_nested_tensor
    if nested:
        raise ArgumentTypeError(
            f"the loss was computed from a nested tensor ({operation(edge[0])}), which has no shape. {PADDED}"
        )
    return tuple(metadata.shape)


def explore(root: Node, stop: Callable[[Edge], bool], skip: Callable[[Node], bool] | None = None) -> LossGraph:
    """Walk from the node of a loss towards its inputs.

    Args:
        root: the node of the loss.
        stop: whether to stop at an edge. The edge is recorded; what it was computed from is not walked.
        skip: whether to pass a node over, as if it were not there.
    """
    graph = LossGraph(nodes=[root])
    nodes, consumers, skipped, visited = graph.nodes, graph.consumers, graph.skipped, {root}
    for node in nodes:  # the list grows during the walk
        for position, edge in enumerate(node.next_functions):
            child = edge[0]
            if child is None:
                continue
            users = consumers.get(edge) or skipped.get(edge)  # type: ignore[arg-type]
            if users is not None:  # the edge was met before
                users.append((node, position))
                continue
            if skip is not None and skip(child):
                skipped[edge] = [(node, position)]  # type: ignore[index]
                continue
            consumers[edge] = [(node, position)]  # type: ignore[index]
            if stop(edge):  # type: ignore[arg-type]
                graph.stops.append(edge)  # type: ignore[arg-type]
            elif child not in visited:
                visited.add(child)
                if child.metadata and is_preconditioned(edge):  # type: ignore[arg-type]
                    graph.preconditioned.append(child)
                else:
                    nodes.append(child)
    return graph


def lowest_number(edges: Iterable[Edge]) -> int:
    """A walk towards the inputs meets none of ``edges`` below a node whose number is lower than this.

    PyTorch numbers the nodes in the order in which they are made: what a node was computed from has a lower number.
    """
    nodes = [node for node, _ in edges]
    return 0 if any(map(is_leaf, nodes)) else min((node._sequence_nr() for node in nodes), default=0)


def upstream_edges(start: Edge, wanted: Iterable[Edge]) -> set[Edge]:
    """Those of ``wanted`` that ``start`` was computed from."""
    wanted = set(wanted)
    lowest = lowest_number(wanted)
    found: set[Edge] = set()
    visited, stack = {start[0]}, [start[0]]
    while stack:
        for edge in children(stack.pop()):
            if edge in wanted:
                found.add(edge)
            node = edge[0]
            if node not in visited and not is_leaf(node) and node._sequence_nr() >= lowest:
                visited.add(node)
                stack.append(node)
    return found


def make_boundary(
    name: str,
    edge: Edge,
    graph: LossGraph,
    features: tuple[int, ...] | None = None,
    layer: Hashable | None = None,
) -> Boundary:
    """The boundary at ``edge``; ``graph`` is the part of the loss's graph that leads there."""
    metadata = edge_metadata(edge)
    if metadata.dtype.is_complex:
        raise ArgumentTypeError(
            f"outputs must have a floating-point dtype; got {metadata.dtype} for {name!r}. {as_real('outputs')}"
        )
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
        features,
        layer,
    )


@functools.cache
def _always_sends(name: str) -> bool:
    """Whether operations of this name send a gradient to each input that requires one.

    PyTorch's own operations do. A user's autograd.Function and PyTorch's second derivatives may send None.
    """
    return name[-1:].isdigit() and "BackwardBackward" not in name


def reduction_of(node: Node) -> Literal["mean", "sum"] | None:
    """How the loss of this node is made of its elements, where it is a loss of torch's own that says so."""
    code = getattr(node, "_saved_reduction", None)
    return {1: "mean", 2: "sum"}.get(code) if isinstance(code, int) else None  # type: ignore[return-value]


def is_output_of_fsdp1(edge: Edge) -> bool:
    """Whether the tensor is what ``FullyShardedDataParallel`` (torch's first FSDP) returned, not a copy of it.

    FSDP puts a hook on the tensors that it returns. The hook gathers the parameters for a backward pass and frees them
    at the end of the pass. A pass of our own that ends at such a tensor makes FSDP free the parameters before the
    network's backward pass needs them.
    """
    layer = edge[0]
    nearby = [layer]
    for _ in range(4):  # from the layer to a view, the split, the flat parameter
        nearby = [child for node in nearby if not is_leaf(node) for child, _ in children(node)]
        if any(is_leaf(node) and getattr(node.variable, "_is_flat_param", False) for node in nearby):  # type: ignore[attr-defined]
            return operation(layer) != "Clone"
    return False


def differentiable_once(gradient: Tensor) -> bool:
    """Whether the graph of a gradient holds the node that ``once_differentiable`` leaves, which raises when run.

    Where nothing else leads from that node to the outputs, autograd drops the branch and does not raise: the second
    derivative would be a silent zero.
    """
    return gradient.grad_fn is not None and any(
        node.name() == "torch::autograd::Error" for node in explore(gradient.grad_fn, lambda edge: False).nodes
    )


def elements_between(gradient: Tensor, edge: Edge) -> int:
    """How many numbers a vector-Jacobian product makes on its way from ``gradient`` back to the outputs at ``edge``."""
    if gradient.grad_fn is None:
        return 0
    nodes = explore(gradient.grad_fn, edge.__eq__).nodes
    return sum(math.prod(tensor.shape) for node in nodes if not is_leaf(node) for tensor in node._input_metadata)  # type: ignore[attr-defined]
