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


def mark_preconditioned(loss: _Edge, edges: Iterable[_Edge]) -> None:
    """Note at which edges a loss takes a Newton step, so that no second one is taken there."""
    node, index = loss
    _metadata(node)[_MARK, index] = preconditioned_edges(loss).union(edges)


def preconditioned_edges(loss: _Edge) -> frozenset[_Edge]:
    """The edges at which :func:`mark_preconditioned` noted a Newton step; empty for most tensors."""
    node, index = loss
    return _metadata(node).get((_MARK, index), frozenset())


def is_preconditioned(loss: _Edge) -> bool:
    """Whether a tensor is a loss that already takes a Newton step."""
    return bool(preconditioned_edges(loss))


def mark_hessian(node: Node, edge: _Edge, blocks: Callable[[], Tensor]) -> None:
    """Note on the node of a loss that ``blocks()`` is its Hessian with respect to the tensor at ``edge``."""
    _metadata(node)[_HESSIAN] = (edge, blocks)


def known_hessian(node: Node) -> tuple[_Edge, Callable[[], Tensor]] | None:
    """The edge and the function that :func:`mark_hessian` noted; None where it noted nothing."""
    return _metadata(node).get(_HESSIAN)


def _metadata(node: Node) -> dict[Any, Any]:
    return node.metadata  # type: ignore[return-value]  # a property that torch annotates as a method
