"""Dominators of random graphs, held against their definition: what every path to the loss passes."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from newton_plugin._boundary.autograd_graph import Edge, LossGraph, edge_of, explore, is_leaf
from newton_plugin._boundary.dominators import DominatorTree, users_of


def random_loss(seed: int) -> Tensor:
    """Sums and products of earlier tensors, and parts of them."""
    draw = random.Random(seed)
    tensors = [torch.ones(4, requires_grad=True).sin() for _ in range(3)]
    for _ in range(12):
        one, other = draw.choice(tensors[-4:]), draw.choice(tensors)
        tensors += draw.choice(
            (
                lambda one, other: [one + other],
                lambda one, other: [one * other],
                lambda one, other: [one.tanh()],
                lambda one, other: [part.repeat(2) for part in (one - other).chunk(2)],
            )
        )(one, other)
    return torch.stack(tensors[-3:]).sum()


def reaches(start: Edge, goal: Edge, without: Edge, graph: LossGraph) -> bool:
    stack, seen = [start], {start, without}
    while stack:
        edge = stack.pop()
        if edge == goal:
            return True
        above = [user for user in users_of(edge, graph) if user not in seen]
        seen.update(above)
        stack += above
    return False


@pytest.mark.parametrize("seed", range(20))
def test_every_path_passes_the_dominators_and_no_other_tensor(seed: int) -> None:
    loss = random_loss(seed)
    assert loss.grad_fn is not None
    graph = explore(loss.grad_fn, lambda edge: is_leaf(edge[0]))
    tree, root = DominatorTree(graph.consumers, graph), edge_of(loss)
    assert tree.root == root
    for edge in graph.consumers:
        dominators, current = set(), edge
        while current != root:
            current = tree.parent[current]
            dominators.add(current)
        by_definition = {
            other for other in tree.order if other not in (edge, root) and not reaches(edge, root, other, graph)
        }
        assert dominators == by_definition | {root}


def test_the_common_dominator_of_two() -> None:
    y = torch.ones(3, requires_grad=True).exp()
    first, second = y.sin(), y.cos()
    meeting = first * second
    loss = (meeting.tanh() + meeting.exp()).sum()
    assert loss.grad_fn is not None
    graph = explore(loss.grad_fn, lambda edge: is_leaf(edge[0]))
    tree = DominatorTree([edge_of(y)], graph)
    assert tree.common(edge_of(first), edge_of(second)) == edge_of(meeting)
    assert tree.parent[edge_of(y)] == edge_of(meeting)
    assert tree.common(edge_of(y), edge_of(loss)) == edge_of(loss)
