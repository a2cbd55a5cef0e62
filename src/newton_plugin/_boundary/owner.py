"""Whose outputs are these? The layer that made a tensor, known by its parameters."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from torch.autograd.graph import Node

from newton_plugin._boundary.autograd_graph import Edge, children, is_leaf
from newton_plugin._boundary.layers import Layers
from newton_plugin._boundary.numbered import number_of

__all__ = ["Owner", "owner_of"]


class Owner(NamedTuple):
    """The layers that are met first below a tensor.

    Attributes:
        parameters: what they apply, by ``numbered.py``; empty if there are none.
        calls: their nodes: another call of the same layer has others.
    """

    parameters: frozenset[int]
    calls: frozenset[Node]


def owner_of(edge: Edge) -> Owner:
    """Who made the tensor that an edge stands for."""
    layers = Layers()
    applied: set[Node] = set()
    calls: set[Node] = set()
    stack, seen = [edge[0]], {edge[0]}
    while stack:
        node = stack.pop()
        if is_leaf(node):
            applied.add(node)
        elif layers.ends_here(node):
            applied |= layers.parameters_of(node)
            calls.add(node)
        else:
            below = [child for child, _ in children(node) if child not in seen]
            seen.update(below)
            stack += below
    variables = (leaf.variable for leaf in applied)  # type: ignore[attr-defined]
    return Owner(frozenset(number_of(v) for v in variables if isinstance(v, nn.Parameter)), frozenset(calls))
