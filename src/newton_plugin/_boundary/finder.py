"""What it means to find where the model's outputs meet the loss, however it is done.

* :class:`newton_plugin._boundary.by_graph.GraphCut` reads it off the autograd graph.
* :class:`newton_plugin._boundary.by_name.ModuleOutput` takes what a named submodule returned.
* :class:`newton_plugin._boundary.by_name.LossCall` takes what a named loss was called with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from newton_plugin._boundary.autograd_graph import (
    Boundary,
    Edge,
    LossGraph,
    edge_shape,
    make_boundary,
    operation,
    upstream_edges,
)

__all__ = ["BoundaryFinder", "Cut", "boundaries_at", "describe"]


@dataclass
class Cut:
    """What a finder found under one loss.

    Attributes:
        boundaries: where to take the step.
        dropped: what was passed over, and why, in words.
        turned: outputs whose features were transposed on the way to the loss, with both shapes, in words.
        seen: what the graph holds, in words, for the error where nothing was found; empty where something was.
        preconditioned: some of the loss carries a Newton step of its own already.
    """

    boundaries: list[Boundary]
    dropped: list[str] = field(default_factory=list)
    turned: list[str] = field(default_factory=list)
    seen: str = ""
    preconditioned: bool = False


class BoundaryFinder(Protocol):
    """From a loss to its boundaries."""

    def __call__(self, loss: Tensor) -> Cut: ...

    def watch(self) -> Any:
        """A context manager around the forward pass and the computation of the loss."""
        ...

    def attach(self, module: nn.Module) -> None:
        """Register on ``module`` what the finder needs."""
        ...

    def detach(self) -> None:
        """Remove it again."""
        ...


def boundaries_at(edges: Mapping[Edge, str], graph: LossGraph, already: int = 0) -> Cut:
    """Make boundaries of edges; of nested ones keep those nearest the loss."""
    cut = Cut([], preconditioned=already > 0 or bool(graph.preconditioned))
    nested: set[Edge] = set()
    if len(edges) > 1:
        for edge in edges:
            nested |= upstream_edges(edge, [e for e in edges if e != edge])
    for edge, name in edges.items():
        if edge in nested:
            what = f"{name!r} (shape {edge_shape(edge)})"
            cut.dropped.append(f"{what}: another boundary nearer the loss is computed from it")
        elif not graph.consumers.get(edge):
            what = f"{name!r} (shape {edge_shape(edge)})"
            cut.dropped.append(f"{what}: the loss does not use it directly")
        else:
            cut.boundaries.append(make_boundary(name, edge, graph))
    if not cut.boundaries:
        cut.seen = describe(graph)
    return cut


def describe(graph: LossGraph, limit: int = 12) -> str:
    """The operations nearest the loss."""
    names = [operation(node) or node.name() for node in graph.nodes]
    more = f", … ({len(names) - limit} more)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
