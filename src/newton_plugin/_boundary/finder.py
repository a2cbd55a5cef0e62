"""What all finders of boundaries share: what they are asked, and what they answer.

* :class:`newton_plugin._boundary.by_graph.GraphFinder` reads the boundary off the autograd graph.
* :class:`newton_plugin._boundary.by_name.ModuleOutput` records what a named submodule returns.
* :class:`newton_plugin._boundary.by_name.LossCall` records what a named loss is called with.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from newton_plugin._boundary.autograd_graph import (
    Boundary,
    Edge,
    LossGraph,
    edge_shape,
    make_boundary,
    operation,
    preconditioned_edges,
    upstream_edges,
)
from newton_plugin._boundary.axes import features_of

__all__ = ["BoundaryFinder", "Cut", "Part", "boundaries_at", "describe", "free_boundaries", "joined_part"]


class Part(NamedTuple):
    """What is known about an edge at which outputs were found.

    Attributes:
        name: see :class:`Boundary`.
        layer: see :class:`Boundary`.
        axis: which dimension counts the samples; see ``axes.py``.
        origins: the edges from which it was moved towards the loss.
    """

    name: str
    layer: frozenset[Any] | None
    axis: int = 0
    origins: frozenset[Edge] = frozenset()


def joined_part(first: Part, parts: Sequence[Part]) -> Part:
    """The part of an edge that several were joined to: the name of the first, the layers and the origins of all."""
    layers = [part.layer for part in parts if part.layer is not None]
    return first._replace(
        layer=frozenset().union(*layers) if len(layers) == len(parts) else None,
        origins=frozenset().union(*(part.origins for part in parts)),
    )


@dataclass
class Cut:
    """The boundaries under one loss, and what a user should know about them.

    Attributes:
        boundaries: where outputs meet the loss; none of them was computed from another.
        left_out: boundaries that were passed over, each with the reason, in words.
        transposed: outputs whose features were transposed on the way to the loss, with both shapes, in words.
        hidden: operations of the loss that hold parameters which the graph does not show, by name.
        beside: what the loss reaches without passing a boundary, by name: its own parameters, terms of earlier layers.
        nested: outputs that were computed from one another and meet where no step can be taken, in words.
        parts: outputs of which the loss takes groups of rows, each a sample: lists of items, say; in words.
        description: where no boundary was found, the operations of the loss, in words; else empty.
        preconditioned: whether a part of the loss already takes a Newton step of its own.
    """

    boundaries: list[Boundary]
    left_out: list[str] = field(default_factory=list)
    transposed: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    nested: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    description: str = ""
    preconditioned: bool = False


class BoundaryFinder(Protocol):
    """Finds the boundaries under a loss."""

    def __call__(self, loss: Tensor) -> Cut: ...

    def watch(self) -> AbstractContextManager[None]:
        """A context manager around the forward pass and the computation of the loss."""
        ...

    def attach(self, module: nn.Module) -> None:
        """Register on ``module`` what the finder needs."""
        ...

    def detach(self) -> None:
        """Remove what :meth:`attach` registered."""
        ...


def boundaries_at(edges: Mapping[Edge, Part], graph: LossGraph) -> Cut:
    """Make boundaries of named edges; where one was computed from another, keep the one nearer the loss."""
    cut = Cut([], preconditioned=bool(graph.preconditioned))
    nested: set[Edge] = set()
    if len(edges) > 1:
        for edge in edges:
            nested |= upstream_edges(edge, [e for e in edges if e != edge])
    for edge, (name, layer, axis, _) in edges.items():
        if edge in nested:
            cut.left_out.append(f"{_shown(edge, name)}: another boundary nearer the loss is computed from it")
        elif not graph.consumers.get(edge):
            cut.left_out.append(f"{_shown(edge, name)}: the loss does not use it directly")
        else:
            features = features_of(axis, edge_shape(edge)) if axis else None
            cut.boundaries.append(make_boundary(name, edge, graph, features, layer))
    if not cut.boundaries:
        cut.description = describe(graph)
    return cut


def _shown(edge: Edge, name: str) -> str:
    return f"{name!r} (shape {edge_shape(edge)})"


def free_boundaries(loss: Tensor, boundaries: list[Boundary]) -> list[Boundary]:
    """The boundaries at which ``loss`` may take a Newton step.

    A loss that already takes one somewhere takes no second one there, nor at a boundary on the same path: one that was
    computed from there, or that it was computed from.
    """
    assert loss.grad_fn is not None
    stepped = preconditioned_edges((loss.grad_fn, loss.output_nr))
    return [b for b in boundaries if not _on_one_path(b.graph_edge, stepped)] if stepped else boundaries


def _on_one_path(edge: Edge, others: Iterable[Edge]) -> bool:
    """Whether ``edge`` is among ``others``, was computed from one of them, or is what one of them was computed from."""
    others = set(others)
    return (
        edge in others or bool(upstream_edges(edge, others)) or any(upstream_edges(other, [edge]) for other in others)
    )


def describe(graph: LossGraph, limit: int = 12) -> str:
    """The names of the operations nearest the loss, at most ``limit`` of them."""
    names = [operation(node) or node.name() for node in graph.nodes]
    more = f", … ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
