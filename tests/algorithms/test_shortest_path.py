"""Exact shortest paths: against brute force, networkx and the definition of the tie rule; gradients; refusals."""

from __future__ import annotations

import importlib.util
import itertools
import math
import threading
from typing import Any

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from newton_plugin import ArgumentError, ArgumentTypeError, NewtonPluginError, ShapeError
from newton_plugin.algorithms import ShortestPath, shortest_path, shortest_path_graph
from newton_plugin.algorithms._shortest_paths import backend as backends

quick = settings(deadline=None, derandomize=True, max_examples=40)
needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")
BACKENDS = ("numba", "torch")
every_backend = pytest.mark.parametrize("backend", [pytest.param("numba", marks=needs_numba), "torch"])
TERRAINS = torch.tensor([0.8, 1.2, 5.3, 7.7, 9.2])


def neighbours(v: tuple[int, int], h: int, w: int) -> list[tuple[int, int]]:
    around = itertools.product(range(v[0] - 1, v[0] + 2), range(v[1] - 1, v[1] + 2))
    return [u for u in around if u != v and 0 <= u[0] < h and 0 <= u[1] < w]


def twin(costs: Tensor) -> tuple[float, list[list[int]]]:
    """The definition, with exact fractions avoided: D in float64 from the start; (D, vertices, place) backwards."""
    h, w = costs.shape
    c = {(i, j): float(costs[i, j]) for i in range(h) for j in range(w)}
    best = dict.fromkeys(c, (math.inf, math.inf))
    best[0, 0] = (c[0, 0], 1)
    # D first, by repetition; then the counts among the neighbours of the smallest D.
    for _ in c:
        for v in c:
            if v != (0, 0):
                d = min(best[u][0] for u in neighbours(v, h, w)) + c[v]
                best[v] = (min(d, best[v][0]), math.inf)
    for _ in c:
        for v in c:
            if v != (0, 0):
                best[v] = (best[v][0], min(best[u] for u in neighbours(v, h, w))[1] + 1)
    path = [[0] * w for _ in range(h)]
    v = (h - 1, w - 1)
    while v != (0, 0):
        path[v[0]][v[1]] = 1
        v = min(neighbours(v, h, w), key=lambda u: (*best[u], u))
    path[0][0] = 1
    return best[h - 1, w - 1][0], path


def maps(kind: str, *shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if kind == "uniform":
        return torch.rand(*shape, generator=g)
    if kind == "terrains":
        return TERRAINS[torch.randint(5, shape, generator=g)]
    if kind == "zeros":  # whole regions cost nothing
        return torch.randint(3, shape, generator=g).double().clamp(min=1) - 1
    # 40 orders of magnitude: adding the small to the large changes nothing, so distances tie where costs do not
    return torch.rand(*shape, generator=g, dtype=torch.float64) * 10 ** (40 * torch.rand(*shape, generator=g).double())


KINDS = ("uniform", "terrains", "zeros", "magnitudes")


@every_backend
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("h", "w"), [(1, 1), (1, 4), (3, 1), (2, 2), (4, 5), (6, 6)])
def test_against_the_definition(kind: str, h: int, w: int, backend: str) -> None:
    costs = maps(kind, 12, h, w)
    distance, path = shortest_path(costs, backend=backend)
    for k, one in enumerate(costs):
        d, p = twin(one.double())
        assert distance[k].item() == pytest.approx(d, rel=1e-6 if costs.dtype == torch.float32 else 0)
        assert path[k].tolist() == p


@needs_numba
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("h", "w"), [(12, 12), (7, 20), (1, 30), (40, 33)])
def test_backends_give_the_same_bits(kind: str, h: int, w: int) -> None:
    costs = maps(kind, 60, h, w).double()
    one, other = (shortest_path(costs, backend=b) for b in BACKENDS)
    assert torch.equal(one.distance, other.distance)
    assert torch.equal(one.path, other.path)


@quick
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_no_simple_path_is_cheaper(h: int, w: int, seed: int) -> None:
    costs = maps("uniform", h, w, seed=seed).double()
    distance, path = shortest_path(costs)
    graph = networkx.Graph()
    graph.add_nodes_from(itertools.product(range(h), range(w)))
    graph.add_edges_from((u, v) for v in list(graph) for u in neighbours(v, h, w))
    if h * w > 1 and h * w <= 9:
        every = networkx.all_simple_paths(graph, (0, 0), (h - 1, w - 1))
        best = min(sum(costs[v].item() for v in p) for p in every)
        assert distance.item() == pytest.approx(best, rel=1e-12)
    assert (path * costs).sum().item() == pytest.approx(distance.item(), rel=1e-12)
    on = [v for v in graph if path[v]]
    assert on[0] == (0, 0)
    assert on[-1] == (h - 1, w - 1)
    assert networkx.is_connected(graph.subgraph(on))


@needs_numba
def test_a_maze_needs_more_rounds_than_the_map_is_wide() -> None:
    size = 21
    walls = torch.zeros(size, size, dtype=torch.float64)
    walls[1::4, :-1] = walls[3::4, 1:] = 1000.0
    costs = walls + 1
    one, other = (shortest_path(costs, backend=b) for b in BACKENDS)
    assert one.distance.item() == one.path.sum().item() > 200
    assert torch.equal(one.path, other.path)


@every_backend
def test_ties_prefer_fewer_vertices_then_the_first_neighbour(backend: str) -> None:
    free = shortest_path(torch.zeros(3, 5), backend=backend).path
    # From the goal (2, 4) back: all distances are 0; (1, 3) is 3 steps from the start, as is (2, 3); (1, 3) is first.
    assert free.int().tolist() == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert shortest_path(torch.ones(4, 4), backend=backend).path.equal(torch.eye(4))


@every_backend
def test_shapes_dtypes_and_empty_batches(backend: str) -> None:
    costs = maps("uniform", 2, 3, 4, 5)
    distance, path = shortest_path(costs, backend=backend)
    assert distance.shape == (2, 3)
    assert path.shape == costs.shape
    assert isinstance(shortest_path(costs), ShortestPath)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        d, p = shortest_path(costs.to(dtype), backend=backend)
        assert d.dtype == p.dtype == dtype
    assert shortest_path(costs[:0], backend=backend).distance.shape == (0, 3)
    flipped = costs.mT  # not contiguous
    assert torch.equal(shortest_path(flipped).distance, shortest_path(flipped.contiguous()).distance)


@needs_numba
def test_threads_split_the_batch_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = maps("uniform", 301, 12, 12)
    alone = shortest_path(costs)
    started = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda self: (started.append(1), start(self))[1])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    together = shortest_path(costs)
    assert len(started) == 3
    assert torch.equal(alone.path, together.path)
    assert torch.equal(alone.distance, together.distance)
    bad = costs.clone()
    bad[300, 5, 5] = -1
    with pytest.raises(ArgumentError, match=r"costs must be finite and not negative; got -1\.0 at index \(300, 5, 5\)"):
        shortest_path(bad)


def test_without_numba_it_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = maps("terrains", 5, 6, 6)
    expected = shortest_path(costs)
    monkeypatch.setattr(backends, "_HAS_NUMBA", False)
    assert torch.equal(shortest_path(costs).path, expected.path)
    with pytest.raises(
        NewtonPluginError, match=r'needs numba, which is not installed: pip install "newton-plugin\[alg'
    ):
        shortest_path(costs, backend="numba")


# The distance as a function of the costs.


@every_backend
def test_the_gradient_of_the_distance_is_the_path(backend: str) -> None:
    costs = maps("uniform", 3, 4, 4).double().requires_grad_()

    def distance(c: Tensor) -> Tensor:
        return shortest_path(c, backend=backend).distance

    assert torch.autograd.gradcheck(distance, costs)
    assert torch.autograd.gradgradcheck(lambda c: distance(c).square(), costs)
    path = shortest_path(costs.detach()).path
    assert torch.equal(torch.func.vmap(torch.func.grad(distance))(costs.detach()), path)
    assert torch.equal(torch.func.jacrev(distance)(costs.detach()).sum(1), path)
    assert torch.equal(torch.func.jacfwd(distance)(costs.detach()).sum(1), path)
    hessian = torch.func.hessian(lambda c: distance(c).square())(costs.detach()[0]).flatten(2).flatten(0, 1)
    flat = path[0].flatten()
    torch.testing.assert_close(hessian, 2 * torch.outer(flat, flat))


def test_the_path_has_no_gradient() -> None:
    costs = maps("uniform", 3, 3).requires_grad_()
    distance, path = shortest_path(costs)
    assert distance.requires_grad
    assert not path.requires_grad
    _, tangent = torch.func.jvp(lambda c: shortest_path(c).path, (costs.detach(),), (torch.ones(3, 3),))
    assert not tangent.any()


def test_vmap_is_one_call() -> None:
    costs = maps("uniform", 4, 3, 5, 5)
    expected = shortest_path(costs)
    got = torch.func.vmap(torch.func.vmap(shortest_path), in_dims=1, out_dims=1)(costs)
    assert torch.equal(got.distance, expected.distance)
    assert torch.equal(got.path, expected.path)


# What dynamo says at a graph break, the second in torch 2.6.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:Graph break due to unsupported builtin")
def test_inside_a_compiled_function() -> None:
    costs = maps("uniform", 3, 4, 4).requires_grad_()

    def loss(c: Tensor) -> Tensor:
        return shortest_path(2 * c).distance.sum()

    value = torch.compile(loss, backend="eager")(costs)
    assert value.item() == loss(costs).item()
    assert torch.equal(torch.autograd.grad(value, costs)[0], 2 * shortest_path(costs).path)


# Graphs.


def grid_edges(h: int, w: int) -> Tensor:
    pairs = [(v, u) for v in itertools.product(range(h), range(w)) for u in neighbours(v, h, w)]
    return torch.tensor([[v[0] * w + v[1], u[0] * w + u[1]] for v, u in pairs]).T


@pytest.mark.parametrize("kind", KINDS)
@every_backend
def test_the_grid_as_a_graph(kind: str, backend: str) -> None:
    costs = maps(kind, 20, 5, 6).double()
    edges = grid_edges(5, 6)
    paid = costs.flatten(1)[:, edges[1]]  # a vertex costs on entering
    distance, path = shortest_path_graph(paid, edges, 0, 29, 30, backend=backend)
    torch.testing.assert_close(distance + costs[:, 0, 0], shortest_path(costs).distance, rtol=1e-14, atol=0)
    if kind == "uniform":
        entered = torch.zeros(20, 30, dtype=path.dtype).index_add(1, edges[1], path).unflatten(1, (5, 6))
        entered[:, 0, 0] = 1
        assert torch.equal(entered, shortest_path(costs).path)


@needs_numba
@quick
@given(st.integers(2, 7), st.integers(0, 25), st.integers(0, 10**6), st.booleans())
def test_random_graphs(nodes: int, extra: int, seed: int, whole: bool) -> None:
    """Loops, parallel edges, zero costs; both backends and networkx."""
    g = torch.Generator().manual_seed(seed)
    chain = torch.stack([torch.arange(nodes - 1), torch.arange(1, nodes)])
    edges = torch.cat([torch.randint(nodes, (2, extra), generator=g), chain], 1)
    count = edges.shape[1]
    costs = torch.randint(4, (3, count), generator=g).double() if whole else torch.rand(3, count, generator=g).double()
    one, other = (shortest_path_graph(costs, edges, 0, nodes - 1, nodes, backend=b) for b in BACKENDS)
    assert torch.equal(one.distance, other.distance)
    assert torch.equal(one.path, other.path)
    for k in range(3):
        graph: Any = networkx.MultiDiGraph()
        graph.add_weighted_edges_from(zip(*edges.tolist(), costs[k].tolist(), strict=True))
        expected = networkx.dijkstra_path_length(graph, 0, nodes - 1)
        assert one.distance[k].item() == pytest.approx(expected, rel=1e-12)
        on = one.path[k].bool()
        assert costs[k][on].sum().item() == pytest.approx(expected, rel=1e-12)
        # Each vertex of a path is left as often as it is entered, at most once.
        balance = edges[0][on].bincount(minlength=nodes) - edges[1][on].bincount(minlength=nodes)
        ends = torch.zeros(nodes, dtype=torch.long)
        ends[0], ends[-1] = 1, -1
        assert torch.equal(balance, ends)


@every_backend
def test_ties_of_edges(backend: str) -> None:
    edges = torch.tensor([[0, 1, 0, 0, 0], [1, 2, 2, 2, 0]])
    path = shortest_path_graph(torch.tensor([1.0, 1.0, 2.0, 2.0, 0.0]), edges, 0, 2, 3, backend=backend).path
    assert path.tolist() == [0, 0, 1, 0, 0]  # fewer edges, then the first listed
    same = shortest_path_graph(torch.rand(2, 5), edges, 1, 1, 3, backend=backend)
    assert same.distance.tolist() == [0, 0]
    assert not same.path.any()


def test_the_gradient_on_a_graph() -> None:
    edges = grid_edges(3, 3)
    costs = torch.rand(2, edges.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient = torch.func.grad(lambda c: shortest_path_graph(c, edges, 0, 8, 9).distance.sum())(costs)
    assert torch.equal(gradient, shortest_path_graph(costs, edges, 0, 8, 9).path)


# What is refused.


@every_backend
@pytest.mark.parametrize(("bad", "shown"), [(math.nan, "nan"), (-0.5, r"-0\.5"), (math.inf, "inf")])
def test_bad_costs(bad: float, shown: str, backend: str) -> None:
    costs = torch.rand(4, 3, 3)
    costs[2, 1, 0] = bad
    with pytest.raises(ArgumentError, match=rf"costs must be finite and not negative; got {shown} at .*softplus"):
        shortest_path(costs, backend=backend)
    edges = grid_edges(3, 3)
    with pytest.raises(ArgumentError, match=rf"edge_costs must be finite and not negative; got {shown}"):
        shortest_path_graph(costs.flatten(1)[:, edges[1]], edges, 0, 8, 9, backend=backend)


@every_backend
def test_overflow(backend: str) -> None:
    with pytest.raises(ArgumentError, match=r"costs are too large: the sum along a path overflows torch.float64"):
        shortest_path(torch.full((3, 3), 1e308, dtype=torch.float64), backend=backend)
    assert shortest_path(torch.full((3, 3), 3e38), backend=backend).path.equal(torch.eye(3))
    chain = torch.tensor([[0, 1], [1, 2]])
    with pytest.raises(ArgumentError, match=r"edge_costs are too large: the sum along a path overflows torch.float64"):
        shortest_path_graph(torch.full((4, 2), 1e308, dtype=torch.float64), chain, 0, 2, 3, backend=backend)


@every_backend
def test_no_way(backend: str) -> None:
    edges = torch.tensor([[0, 1, 2, 0], [1, 0, 3, 0]])
    with pytest.raises(ArgumentError, match=r"target must be reachable from source; no path leads from 0 to 3"):
        shortest_path_graph(torch.ones(2, 4), edges, 0, 3, 4, backend=backend)
    with pytest.raises(ArgumentError, match=r"no path leads from 1 to 3.*for streets both ways pass"):
        shortest_path_graph(torch.ones(4), edges, 1, 3, 4, backend=backend)


def test_wrong_arguments() -> None:
    with pytest.raises(ShapeError, match=r"costs must have shape \(\.\.\., h, w\) with h, w >= 1; got \(3,\)"):
        shortest_path(torch.ones(3))
    with pytest.raises(ArgumentTypeError, match=r"costs must have a floating-point dtype; got torch.int64"):
        shortest_path(torch.ones(3, 3, dtype=torch.long))
    with pytest.raises(ArgumentError, match=r"backend must be one of 'auto', 'numba', 'torch'; got 'scipy'"):
        shortest_path(torch.ones(3, 3), backend="scipy")
    edges, costs = torch.tensor([[0, 1], [1, 2]]), torch.ones(2)
    for arguments, error, message in [
        ((costs, edges.T[:1], 0, 2, 3), ShapeError, r"edges \(2, E\); got \(2,\) and \(1, 2\).*needs edges\.T"),
        (
            (costs, edges.float(), 0, 2, 3),
            ArgumentTypeError,
            r"edges must be a tensor of int64 or int32; got torch\.fl",
        ),
        ((costs, edges, 0, 3, 3), ArgumentError, r"target must be a vertex, 0 to num_nodes - 1 = 2; got 3"),
        ((costs, edges, 0.5, 2, 3), ArgumentTypeError, r"source must be an integer, the index of one vertex; got 0\.5"),
        ((costs, edges, 0, 1, 2), ArgumentError, r"edges must join vertices 0 to num_nodes - 1 = 1; got 0 to 2"),
    ]:
        with pytest.raises(error, match=message):
            shortest_path_graph(*arguments)


def test_edges_need_not_exist() -> None:
    """A graph without edges has the empty path from a vertex to itself."""
    for backend in ("auto", "torch"):
        found = shortest_path_graph(torch.ones(3, 0), torch.zeros(2, 0, dtype=torch.int32), 1, 1, 2, backend=backend)
        assert found.distance.tolist() == [0, 0, 0]
        assert found.path.shape == (3, 0)
