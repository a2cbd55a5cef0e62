"""Marks on the node of a loss: where it already takes a Newton step, and the Hessian that it brings itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

__all__ = ["is_preconditioned", "known_hessian", "mark_hessian", "mark_preconditioned", "preconditioned_edges"]

_Edge = tuple[Node, int]

_MARK = "newton_plugin"
_HESSIAN = "newton_plugin_hessian"


def mark_preconditioned(node: Node, edges: Iterable[_Edge]) -> None:
    """Note on the node of a loss at which edges it takes a Newton step, so that no second one is taken there."""
    _metadata(node)[_MARK] = preconditioned_edges(node).union(edges)


def preconditioned_edges(node: Node) -> frozenset[_Edge]:
    """The edges at which :func:`mark_preconditioned` noted a Newton step; empty for most nodes."""
    return _metadata(node).get(_MARK, frozenset())


def is_preconditioned(node: Node) -> bool:
    """Whether this is the node of a loss that already takes a Newton step."""
    return bool(preconditioned_edges(node))


def mark_hessian(node: Node, edge: _Edge, blocks: Callable[[], Tensor]) -> None:
    """Note on the node of a loss that ``blocks()`` is its Hessian with respect to the tensor at ``edge``."""
    _metadata(node)[_HESSIAN] = (edge, blocks)


def known_hessian(node: Node) -> tuple[_Edge, Callable[[], Tensor]] | None:
    """The edge and the function that :func:`mark_hessian` noted; None where it noted nothing."""
    return _metadata(node).get(_HESSIAN)


def _metadata(node: Node) -> dict[str, Any]:
    return node.metadata  # type: ignore[return-value]  # a property that torch annotates as a method
