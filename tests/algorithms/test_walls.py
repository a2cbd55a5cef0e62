"""An infinite cost is an impassable tile: the twin and Dijkstra's algorithm on the graph without it, and refusals."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.algorithms.test_bellman_ford import LOOPS, OFFSETS, every_loop, maps, twin
from torch import Tensor

from newton_plugin import ArgumentError
from newton_plugin.algorithms import relaxed_bellman_ford
from newton_plugin.algorithms._shortest_paths import bellman_ford

INF = math.inf


def _walled(*shape: int, seed: int, share: float = 0.3, dtype: torch.dtype = torch.float64) -> Tensor:
    """Maps with infinite tiles of which each has a path."""
    generator = torch.Generator().manual_seed(seed)
    costs = maps(*shape, seed=seed, dtype=dtype)
    for one in costs.reshape(-1, *shape[-2:]):
        while True:
            walls = torch.rand(one.shape, generator=generator) < share
            walls[0, 0] = walls[-1, -1] = False
            if math.isfinite(_dijkstra(one.masked_fill(walls, INF))[0]):
                break
        one.masked_fill_(walls, INF)
    return costs


def _dijkstra(costs: Tensor) -> tuple[float, Tensor, int]:
    """By scipy, on the graph of the finite tiles: distance without the start's cost, the path, its steps."""
    graph = pytest.importorskip("scipy.sparse.csgraph")
    h, w = costs.shape
    c = costs.double().numpy()
    edges = np.zeros((h * w, h * w))
    for (i, j), (a, b) in itertools.product(np.ndindex(h, w), OFFSETS):
        x, y = i + a, j + b
        if 0 <= x < h and 0 <= y < w and np.isfinite(c[i, j]) and np.isfinite(c[x, y]):
            edges[i * w + j, x * w + y] = c[x, y]
    distance, before = graph.dijkstra(edges, indices=0, return_predecessors=True)
    path, at, steps = torch.zeros(h * w, dtype=torch.float64), h * w - 1, 0
    while at >= 0 and math.isfinite(distance[-1]):
        path[at] = 1
        at, steps = int(before[at]), steps + 1
    return float(distance[-1]), path.view(h, w), steps


@every_loop
@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(2, 5), st.integers(2, 5), st.floats(0.1, 20), st.integers(0, 10**6))
def test_the_result_is_that_of_the_map_without_the_wall(loop: str, h: int, w: int, steepness: float, seed: int) -> None:
    costs = _walled(h, w, seed=seed)
    n = h * w
    ours, theirs = costs.clone().requires_grad_(), costs.clone().requires_grad_()
    a = relaxed_bellman_ford(ours, loop=loop, steepness=steepness, iterations=n, max_steps=7)
    b = twin(theirs, loop, steepness, n, 7)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    weight = maps(h, w, seed=seed + 1)
    (ga,), (gb,) = (torch.autograd.grad((y * weight).sum(), x) for x, y in ((ours, a), (theirs, b)))
    torch.testing.assert_close(ga, gb, rtol=0, atol=1e-11)
    assert torch.equal(ga[costs == INF], torch.zeros_like(ga[costs == INF]))
    assert torch.equal(a[costs == INF], torch.zeros_like(a[costs == INF]))


@every_loop
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_steep_it_is_dijkstras_path(loop: str, dtype: torch.dtype, scale: float) -> None:
    costs = _walled(12, 8, 8, seed=3, dtype=dtype) * scale
    x = costs.clone().requires_grad_()
    soft = relaxed_bellman_ford(x, loop=loop, steepness=1e7 / scale, iterations=40, max_steps=60, stop_at_start=True)
    exact = torch.stack([_dijkstra(one)[1] for one in costs])
    torch.testing.assert_close(soft.double(), exact, rtol=0, atol=1e-4)
    (g,) = torch.autograd.grad(soft.square().sum(), x)
    assert g.isfinite().all()


@every_loop
def test_all_derivatives_are_finite_and_right(loop: str) -> None:
    costs = torch.tensor([[1.0, INF, 0.3, 0.5], [0.2, 0.7, INF, 0.4], [0.9, 0.6, 0.8, 1.0]], dtype=torch.float64)
    passable = costs < INF

    def path(finite: Tensor) -> Tensor:
        return relaxed_bellman_ford(costs.masked_scatter(passable, finite), loop=loop, steepness=3.0)

    x = costs[passable].requires_grad_()
    assert torch.autograd.gradcheck(path, x)
    assert torch.autograd.gradgradcheck(path, x)
    hessian = torch.func.hessian(lambda c: relaxed_bellman_ford(c, loop=loop, steepness=3.0).square().sum())(costs)
    assert hessian.isfinite().all()
    assert hessian[~passable].count_nonzero() == hessian[:, :, ~passable].count_nonzero() == 0
    kept = relaxed_bellman_ford(costs, loop=loop, steepness=3.0, checkpoint=True)
    torch.testing.assert_close(kept, relaxed_bellman_ford(costs, loop=loop, steepness=3.0))


@every_loop
def test_a_wall_changes_no_other_map_and_no_map_without(loop: str) -> None:
    """To the bit; and a cost so large that no path takes it is nearly a wall."""
    open_map, walled = maps(5, 5, seed=1), _walled(5, 5, seed=2)
    both, beside = (
        relaxed_bellman_ford(torch.stack((open_map, other)), loop=loop, steepness=5.0, iterations=20)
        for other in (walled, maps(5, 5, seed=2))
    )
    assert torch.equal(both[0], beside[0])
    dear = walled.masked_fill(walled == INF, 1e3)
    almost = relaxed_bellman_ford(dear, loop=loop, steepness=5.0, iterations=20)
    torch.testing.assert_close(both[1], almost, rtol=0, atol=1e-12)


def test_half_precision_and_negative_costs() -> None:
    costs = _walled(4, 6, 6, seed=5)
    for dtype in (torch.float16, torch.bfloat16):
        path = relaxed_bellman_ford(costs.to(dtype), iterations=30)
        assert path.dtype == dtype
        expected = relaxed_bellman_ford(costs.to(dtype).double(), iterations=30)
        torch.testing.assert_close(path.double(), expected, rtol=0, atol=0.02)
    lower = (costs - 0.7)[0]
    ours = relaxed_bellman_ford(lower, steepness=2.0, iterations=12)
    torch.testing.assert_close(ours, twin(lower, "for", 2.0, 12, 0), rtol=0, atol=1e-12)


MAZE = torch.tensor(
    [[1, 1, 1, 1, 1], [INF, INF, INF, INF, 1], [1, 1, 1, 1, 1], [1, INF, INF, INF, INF], [1, 1, 1, 1, 1]]
)
NO_PATH: dict[str, tuple[Tensor, dict[str, Any]]] = {
    "a wall from side to side": (torch.tensor([[1.0, 1.0], [INF, INF], [1.0, 1.0]]), {}),
    "an impassable start": (torch.tensor([[INF, 1.0], [1.0, 1.0]]), {}),
    "an impassable goal": (torch.tensor([[1.0, 1.0], [1.0, INF]]), {}),
    "walls alone": (torch.full((3, 4), INF), {}),
    "one impassable tile": (torch.tensor([[INF]]), {}),
    "a longer path than iterations": (MAZE, {"iterations": 8}),
}


@every_loop
@pytest.mark.parametrize("case", NO_PATH)
def test_no_path_is_said(loop: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    costs, options = NO_PATH[case]
    said = r"costs must leave a path of at most iterations=\d+ steps.*the map at index \(1,\) has none"
    with pytest.raises(ArgumentError, match=said):
        relaxed_bellman_ford(torch.stack((torch.ones_like(costs), costs)), loop=loop, **options)
    # Where nobody looks, as on a device, that map is NaN, and no other is.
    monkeypatch.setattr(bellman_ford, "can_look", lambda tensor: False)
    paths = relaxed_bellman_ford(torch.stack((torch.ones_like(costs), costs)), loop=loop, **options)
    assert paths[0].isfinite().all()
    assert paths[1].isnan().all()


def test_iterations_that_suffice_find_the_way_through_a_maze() -> None:
    steps = _dijkstra(MAZE)[2]
    for loop in LOOPS:
        options: dict[str, Any] = {"loop": loop, "steepness": 50.0, "max_steps": 60, "stop_at_start": True}
        path = relaxed_bellman_ford(MAZE, iterations=steps, **options)
        torch.testing.assert_close(path.double(), _dijkstra(MAZE)[1], rtol=0, atol=1e-4)
        with pytest.raises(ArgumentError, match="a maze needs"):
            relaxed_bellman_ford(MAZE, iterations=steps - 2, **options)


def test_nan_costs_stay_nan_and_are_no_walls() -> None:
    costs = maps(3, 4, 4)
    costs[1, 2, 2] = math.nan
    path = relaxed_bellman_ford(costs)
    assert path[1].isnan().any()
    assert torch.equal(path[[0, 2]], relaxed_bellman_ford(costs[[0, 2]]))


@every_loop
def test_transforms_and_the_compiler(loop: str) -> None:
    costs = _walled(3, 4, 4, seed=7)

    def path(c: Tensor) -> Tensor:
        return relaxed_bellman_ford(c, loop=loop, iterations=10)

    torch.testing.assert_close(torch.func.vmap(path)(costs), path(costs))
    compiled = torch.compile(path, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(costs), path(costs))
    assert compiled(costs.clone().fill_(INF)).isnan().all()
    torch.compiler.reset()
