"""Losses that are made of several parts of one batch, where each part couples its rows: a list of items, say.

Such a part is one sample of the loss, but the rows of the outputs are counted. There are two ways to write it: the
outputs are split along the batch, or one layer is called for each part. The graph tells neither from a loss of several
batches, so what is found is put into words, and only where three things hold: there are more than a few parts; each
couples its own rows (a softmax over them, a sort, differences of pairs); and the parts meet as numbers that are added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from torch.autograd.graph import Node

from newton_plugin._boundary.autograd_graph import Edge, LossGraph, children, edge_shape, operation
from newton_plugin._boundary.axes import TRANSPOSITIONS, signed
from newton_plugin._boundary.dominators import users_of
from newton_plugin._boundary.finder import Part
from newton_plugin._boundary.layers import Layers
from newton_plugin._boundary.terms import is_added_up

__all__ = ["parts_of"]

_FEWEST_PARTS = 3
_FEWEST_CALLS = 4
_SPLITS = frozenset(("Split", "SplitWithSizes"))
_PICKS = frozenset(("Slice", "Index", "IndexSelect", "Narrow", "MaskedSelect"))
_ALONG_A_DIMENSION = frozenset(("LogSoftmax", "Softmax", "Logsumexp", "Logcumsumexp", "Cumsum", "Cumprod", "Sort")) | {
    *("Topk", "Max", "Min", "Amax", "Amin", "Flip", "Roll", "Gather", "Kthvalue", "Median")
}
_SUMS = frozenset(("Sum", "Mean"))
_ROWWISE_LOSSES = frozenset(("NllLoss", "MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy", "KlDiv")) | {
    *("BinaryCrossEntropyWithLogits", "SoftMarginLoss", "MultiMarginLoss", "MultilabelMarginLoss", "NllLossNd")
}
_REDUCTIONS = _SUMS | _ROWWISE_LOSSES


def parts_of(edges: Mapping[Edge, Part], graph: LossGraph, layers: Layers, operations: Set[str]) -> list[str]:
    """In words, the outputs whose parts are samples of the loss: split along the batch, or one call for each.

    Args:
        edges: the boundaries.
        graph, layers: of the loss.
        operations: the names of what the nodes of the loss are.
    """
    if len(edges) < _FEWEST_CALLS and operations.isdisjoint(_SPLITS | _PICKS):
        return []
    found = []
    calls: dict[frozenset[object], list[Edge]] = {}
    for edge, part in edges.items():
        if part.layer is not None:
            calls.setdefault(part.layer, []).append(edge)
        pieces = _pieces(edge, graph) if part.axis == 0 else []
        if len(pieces) >= _FEWEST_PARTS and _are_samples(pieces, graph, layers):
            found.append(
                f"{part.name!r} (shape {edge_shape(edge)}): its rows enter the loss in {len(pieces)} parts, each a "
                "term of its own"
            )
    for together in calls.values():
        if len(together) >= _FEWEST_CALLS and _are_samples(together, graph, layers):
            rows = sum(edge_shape(edge)[0] for edge in together)
            found.append(
                f"{edges[together[0]].name!r} ({rows} rows): they enter the loss in {len(together)} parts, one call "
                "of the layer for each, each a term of its own"
            )
    return found


def _pieces(edge: Edge, graph: LossGraph) -> list[Edge]:
    """The parts into which the rows are split, perhaps after operations that treat each row alone."""
    while True:
        users = graph.consumers.get(edge, [])
        after = list(users_of(edge, graph))
        if len(users) == 1 and operation(users[0][0]) not in _SPLITS:
            if len(after) != 1 or not _keeps_rows(users[0][0], edge, after[0]):
                return []
            edge = after[0]
            continue
        if any(operation(node) not in _SPLITS | _PICKS or not _along_rows(node) for node, _ in users):
            return []
        return after


def _along_rows(node: Node) -> bool:
    """Whether an operation that picks does so in the first dimension."""
    dim = getattr(node, "_saved_dim", None)
    if isinstance(dim, int):
        return dim == 0
    indices = getattr(node, "_saved_indices", None)
    if indices:
        return indices[0] is not None
    return operation(node) == "MaskedSelect"


def _are_samples(pieces: Iterable[Edge], graph: LossGraph, layers: Layers) -> bool:
    """Whether each piece becomes numbers that are added, without meeting another, and couples its rows on the way."""
    taken: set[Edge] = set()
    coupled = False
    for piece in pieces:
        stack, own = [piece], {piece}
        while stack:
            edge = stack.pop()
            for user in users_of(edge, graph):
                if not edge_shape(user):
                    coupled = coupled or operation(user[0]) not in _REDUCTIONS
                    if not is_added_up(user, graph, layers, numbers=True):
                        return False
                    continue
                coupled = coupled or not _keeps_rows(user[0], edge, user)
                if user in taken:
                    return False
                if user not in own:
                    own.add(user)
                    stack.append(user)
        taken |= own
    return coupled


def _keeps_rows(node: Node, edge: Edge, after: Edge) -> bool:
    """Whether each row of ``after`` was computed from the same row of ``edge`` alone, as far as shapes tell."""
    name, before, shape = operation(node), edge_shape(edge), edge_shape(after)
    if not shape or not before or before[0] != shape[0] or name in TRANSPOSITIONS:
        return False
    if name in _ALONG_A_DIMENSION or name in _SUMS:
        dims = getattr(node, "_saved_dim", None)
        dims = dims if isinstance(dims, tuple) else (dims,)
        return all(dim is not None and signed(dim) % len(before) != 0 for dim in dims)
    if name in _PICKS or name in _SPLITS:
        return False
    return len(shape) <= len(before) or len(list(children(node))) == 1
