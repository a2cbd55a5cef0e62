"""Which tensors all paths from a tensor to the loss share: the dominators of the graph, seen from the loss.

An edge *dominates* another if every path from the other one up to the loss passes it. The immediate dominators form a
tree with the loss at its root. A graph without circles needs one pass over the edges in which the users of an edge come
before it (Cooper, Harvey, Kennedy 2001, "A simple, fast dominance algorithm", section 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from newton_plugin._boundary.autograd_graph import Edge, LossGraph

__all__ = ["DominatorTree", "users_of"]


class DominatorTree:
    """The dominators of some edges of a loss's graph.

    Args:
        edges: of the part of the graph that was walked.
        graph: that part.

    Attributes:
        root: the loss.
        parent: the immediate dominator of every edge on a path from ``edges`` to the loss, but for the loss's own.
        order: these edges and the loss; whatever uses an edge comes before it.
    """

    def __init__(self, edges: Iterable[Edge], graph: LossGraph) -> None:
        self.root: Edge = (graph.nodes[0], 0)
        self.parent: dict[Edge, Edge] = {}
        self.order = _loss_first(edges, graph)
        self._depth: dict[Edge, int] = {self.root: 0}
        for edge in self.order:
            if edge == self.root:
                continue
            parent = None
            for user in users_of(edge, graph):
                parent = user if parent is None else self.common(parent, user)
            assert parent is not None
            self.parent[edge] = parent
            self._depth[edge] = self._depth[parent] + 1

    def common(self, first: Edge, second: Edge) -> Edge:
        """The lowest edge that dominates both, seen from them; one of them may be it."""
        while first != second:
            if self._depth[first] < self._depth[second]:
                first, second = second, first
            first = self.parent[first]
        return first


def users_of(edge: Edge, graph: LossGraph) -> Iterator[Edge]:
    """The tensors of the loss that were computed from a tensor in one operation."""
    for node, _ in graph.consumers.get(edge, ()):
        if node is graph.nodes[0]:
            yield node, 0
            continue
        for index in range(len(node._input_metadata)):  # type: ignore[attr-defined]
            if (node, index) in graph.consumers:
                yield node, index


def _loss_first(edges: Iterable[Edge], graph: LossGraph) -> list[Edge]:
    """The edges on all paths from ``edges`` to the loss; whatever uses an edge comes before it."""
    order, done = [], set()
    for start in edges:
        path = [(start, users_of(start, graph))] if start not in done else []
        done.add(start)
        while path:
            edge, rest = path[-1]
            user = next((u for u in rest if u not in done), None)
            if user is None:
                order.append(edge)
                path.pop()
            else:
                done.add(user)
                path.append((user, users_of(user, graph)))
    return order
