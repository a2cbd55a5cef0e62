"""relaxed_bellman_ford: the published package, a twin in plain loops, limits, derivatives of both orders, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from newton_plugin import ArgumentError, ArgumentTypeError, ShapeError
from newton_plugin.algorithms import relaxed_bellman_ford, shortest_path
from newton_plugin.algorithms._shortest_paths import grid

LOOPS = ("for", "while")
every_loop = pytest.mark.parametrize("loop", LOOPS)
quick = settings(deadline=None, derandomize=True, max_examples=20)
OFFSETS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]


def maps(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.2).to(dtype)


def published(steepness: float, iterations: int, loop: str, max_steps: int, exact: bool = True) -> Any:
    """The same algorithm written in the language of the AlgoVision package; 1e12 stands for infinity."""
    av = pytest.importorskip("algovision")

    def shifted(x: Tensor, i: int, j: int, fill: float) -> Tensor:
        h, w = x.shape[-2:]
        framed = torch.nn.functional.pad(x, (1, 1, 1, 1), value=fill)
        return framed[:, 1 + i : 1 + i + h, 1 + j : 1 + j + w]

    def relax(d: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
        u = torch.stack([shifted(d, i, j, 1e12) for i, j in OFFSETS], -1)
        weights = torch.nn.functional.softmin(steepness * u, -1)
        return (weights * u).sum(-1) + cost, weights

    def back(place: Tensor, weights: Tensor) -> Tensor:
        parts = [shifted(place * weights[..., k], -i, -j, 0.0) for k, (i, j) in enumerate(OFFSETS)]
        return torch.stack(parts).sum(0)

    # Its Let statements read the names of the parameters.
    mark = av.Let("path", lambda path, place: path + place - path * place)
    move = av.Let("place", lambda place, weights: back(place, weights))
    if loop == "for":
        walk = av.For("step", iterations, mark, move)
    else:
        condition = av.LEq(lambda path: path[:, 0, 0], 1.0)
        walk = av.While(condition, mark, move, **({"max_iter": max_steps, "epsilon": 0.0} if exact else {}))
    return av.Algorithm(
        av.Input("cost"),
        av.Var("d", lambda cost: torch.full(cost.shape[1:], 1e12, dtype=cost.dtype)),
        av.Var("weights", lambda cost: torch.zeros(*cost.shape[1:], 8, dtype=cost.dtype)),
        av.Var("place", lambda cost: torch.zeros(cost.shape[1:], dtype=cost.dtype)),
        av.Var("path", lambda cost: torch.zeros(cost.shape[1:], dtype=cost.dtype)),
        av.Let("d", [0, 0], 0.0),
        av.Let("place", [-1, -1], 1.0),
        av.For("round", iterations, av.Let(["d", "weights"], lambda d, cost: relax(d, cost)), av.Let("d", [0, 0], 0.0)),
        walk,
        av.Output("path"),
        beta=steepness,
    )


def run_published(costs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    torch.set_default_dtype(costs.dtype)  # the package creates some tensors in the default dtype
    try:
        return published(*args, **kwargs)(costs)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing")  # in algovision
@every_loop
@pytest.mark.parametrize(("h", "w"), [(12, 12), (3, 7), (7, 3), (2, 2), (1, 5)])
@pytest.mark.parametrize("steepness", [0.5, 5.0, 30.0])
def test_agrees_with_algovision(loop: str, h: int, w: int, steepness: float) -> None:
    ours, theirs = maps(3, h, w).requires_grad_(), maps(3, h, w).requires_grad_()
    a = relaxed_bellman_ford(ours, loop=loop, steepness=steepness)
    b = run_published(theirs, steepness, h + w, loop, 2 * (h + w))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    target = shortest_path(ours.detach()).path
    for loss in (torch.nn.functional.l1_loss, torch.nn.functional.mse_loss):
        (ga,), (gb,) = (torch.autograd.grad(loss(y, target), x, retain_graph=True) for x, y in ((ours, a), (theirs, b)))
        torch.testing.assert_close(ga, gb, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing")
def test_where_algovision_stops_early_it_differs_by_its_threshold() -> None:
    """Its While leaves when all of a batch are within 1e-5 of having ended; ours goes on to ``max_steps``."""
    costs = maps(3, 8, 8)
    theirs = run_published(costs, 10.0, 16, "while", 0, exact=False)
    ours = relaxed_bellman_ford(costs, loop="while", steepness=10.0, max_steps=60)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def twin(costs: Tensor, loop: str, steepness: float, iterations: int, max_steps: int) -> Tensor:
    """One map, by dictionaries; impassable tiles are no vertices."""
    h, w = costs.shape
    tiles = [(i, j) for i in range(h) for j in range(w)]
    vertices = [v for v in tiles if costs[v] < math.inf]
    near = {(i, j): [(i + a, j + b) for a, b in OFFSETS if (i + a, j + b) in vertices] for i, j in vertices}
    start, goal = (0, 0), (h - 1, w - 1)
    d = {start: torch.zeros((), dtype=costs.dtype)}
    weights: dict = {}
    for _ in range(iterations):
        new = {}
        for v in vertices:
            known = [u for u in near[v] if u in d]
            if known:
                soft = torch.softmax(torch.stack([-steepness * d[u] for u in known]), 0)
                weights[v] = dict(zip(known, soft, strict=True))
                new[v] = costs[v] + sum(weights[v][u] * d[u] for u in known)
        d = {**new, start: d[start]}
    place = {v: torch.tensor(float(v == goal), dtype=costs.dtype) for v in vertices}
    path = {v: torch.tensor(0.0, dtype=costs.dtype) for v in vertices}
    result, running = dict(path), torch.sigmoid(steepness * (1 - path[start]))
    for _ in range(iterations if loop == "for" else max_steps):
        path = {v: 1 - (1 - path[v]) * (1 - place[v]) for v in vertices}
        moves = {x: [(v, weights[v][x]) for v in near[x] if x in weights.get(v, {})] for x in vertices}
        place = {x: sum((place[v] * share for v, share in moves[x]), torch.tensor(0.0)) for x in vertices}
        still = running * torch.sigmoid(steepness * (1 - path[start]))
        result = {v: result[v] + (running - still) * path[v] for v in vertices}
        running = still
    last = path if loop == "for" else {v: result[v] + running * path[v] for v in vertices}
    return torch.stack([last.get(v, costs.new_zeros(())) for v in tiles]).view(h, w)


@every_loop
@quick
@given(st.integers(2, 4), st.integers(2, 4), st.floats(0.1, 20), st.integers(0, 3), st.integers(0, 10**6))
def test_against_plain_loops(loop: str, h: int, w: int, steepness: float, more: int, seed: int) -> None:
    costs, n = maps(h, w, seed=seed), max(h, w) + more
    ours = relaxed_bellman_ford(costs, loop=loop, steepness=steepness, iterations=n, max_steps=7)
    torch.testing.assert_close(ours, twin(costs, loop, steepness, n, 7), rtol=0, atol=1e-12)


@every_loop
def test_steep_it_is_the_shortest_path(loop: str) -> None:
    """As published, with the start's cheapest neighbour on top: wholly or half."""
    costs = maps(20, 8, 8)
    exact = shortest_path(costs).path
    soft = relaxed_bellman_ford(costs, loop=loop, steepness=1e5, max_steps=60, stop_at_start=True)
    torch.testing.assert_close(soft, exact, rtol=0, atol=1e-5)
    neighbours = costs[:, :2, :2].flatten(1)
    neighbours[:, 0] = math.inf
    extra = torch.zeros_like(neighbours).scatter(1, neighbours.argmin(1, keepdim=True), 1 if loop == "for" else 0.5)
    expected = exact.clone()
    expected[:, :2, :2] = torch.maximum(exact[:, :2, :2], extra.unflatten(1, (2, 2)))
    assert not torch.equal(expected, exact)
    published = relaxed_bellman_ford(costs, loop=loop, steepness=1e5, max_steps=60)
    torch.testing.assert_close(published, expected, rtol=0, atol=1e-5)


def test_the_start_is_free() -> None:
    costs = maps(2, 5, 5)
    dearer = costs.clone()
    dearer[:, 0, 0] += 7
    for loop in LOOPS:
        assert torch.equal(relaxed_bellman_ford(costs, loop=loop), relaxed_bellman_ford(dearer, loop=loop))


@every_loop
def test_mirror_images_and_units(loop: str) -> None:
    """Transposed maps have transposed paths; what counts is steepness times costs."""
    costs = maps(3, 4, 6)
    path = relaxed_bellman_ford(costs, loop=loop, steepness=4.0)
    assert path.min() >= 0
    assert path.max() <= 1
    torch.testing.assert_close(relaxed_bellman_ford(costs.mT, loop=loop, steepness=4.0), path.mT)
    if loop == "for":
        torch.testing.assert_close(relaxed_bellman_ford(100 * costs, steepness=0.04), path)


@every_loop
def test_both_derivatives(loop: str) -> None:
    costs = maps(2, 3, 4).requires_grad_()

    def path(c: Tensor) -> Tensor:
        return relaxed_bellman_ford(c, loop=loop, steepness=3.0)

    assert torch.autograd.gradcheck(path, costs)
    assert torch.autograd.gradgradcheck(path, costs[:1].detach().requires_grad_())


@every_loop
@pytest.mark.parametrize("loss", [torch.nn.functional.l1_loss, torch.nn.functional.mse_loss])
def test_torch_func(loop: str, loss: Any) -> None:
    costs = maps(3, 3, 4)
    target = shortest_path(costs).path

    def one(c: Tensor, t: Tensor) -> Tensor:
        return loss(relaxed_bellman_ford(c, loop=loop, steepness=3.0), t)

    expected = [
        torch.autograd.functional.hessian(lambda c, t=t: one(c, t), c) for c, t in zip(costs, target, strict=True)
    ]
    got = torch.func.vmap(torch.func.hessian(one))(costs, target)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-9, atol=1e-12)
    gradient = torch.func.vmap(torch.func.grad(one))(costs, target)
    torch.testing.assert_close(gradient, 3 * torch.func.grad(one)(costs, target), rtol=1e-9, atol=1e-12)
    assert got.abs().max() > 1e-3


def test_the_l1_loss_is_smooth_because_the_path_stays_inside() -> None:
    """|path - t| is path or 1 - path, so the Hessian of L1 is that of a linear function of the path."""
    costs = maps(3, 4)
    target = shortest_path(costs).path
    sign = 1 - 2 * target

    def hessian(loss: Any) -> Tensor:
        return torch.func.hessian(lambda c: loss(relaxed_bellman_ford(c, steepness=3.0)))(costs)

    torch.testing.assert_close(hessian(lambda p: (p - target).abs().sum()), hessian(lambda p: (sign * p).sum()))


@every_loop
def test_checkpoints_change_memory_only(loop: str) -> None:
    costs = maps(4, 12, 12)
    target = shortest_path(costs).path
    kept, results = [], []
    for checkpoint in (False, True):
        x, sizes = costs.clone().requires_grad_(), {}

        def pack(t: Tensor, sizes: dict = sizes) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            path = relaxed_bellman_ford(x, loop=loop, iterations=40, max_steps=5, checkpoint=checkpoint)
        loss = torch.nn.functional.mse_loss(path, target)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x)
        results.append((path.detach(), g.detach(), h))
        kept.append(sum(sizes.values()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    if loop == "while":
        assert kept[1] < 0.5 * kept[0]


@every_loop
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e6, 1e30])
def test_float32_of_any_size_is_finite_and_right(loop: str, scale: float) -> None:
    """Saturated or uniform: value, gradient and Hessian-vector product against float64."""
    costs = maps(5, 6, 6)
    target = shortest_path(costs.flip(0)).path
    found = []
    for dtype in (torch.float64, torch.float32):
        x = (scale * costs).to(dtype).requires_grad_()
        loss = torch.nn.functional.mse_loss(relaxed_bellman_ford(x, loop=loop, steepness=5.0), target.to(dtype))
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        (h,) = torch.autograd.grad((g * target.to(dtype)).sum(), x)
        found.append((loss.detach(), g.detach(), h))
    for exact, got in zip(*found, strict=True):
        assert got.isfinite().all()
        if scale <= 1:
            # Steepness times distances of up to 30 carries a rounding of 30 * 6e-8 into the weights.
            error = (got.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)
            assert error < 2e-4


@every_loop
def test_a_map_does_not_feel_its_batch(loop: str) -> None:
    costs = maps(5, 6, 6)
    costs[1:] *= 30
    together = relaxed_bellman_ford(costs, loop=loop)
    for one, path in zip(costs, together, strict=True):
        torch.testing.assert_close(relaxed_bellman_ford(one, loop=loop), path, rtol=1e-13, atol=1e-15)


def test_shapes_and_dtypes() -> None:
    costs = maps(2, 3, 4, 5, dtype=torch.float32)
    path = relaxed_bellman_ford(costs)
    assert path.shape == costs.shape
    torch.testing.assert_close(path[1, 2], relaxed_bellman_ford(costs[1, 2]))
    for dtype in (torch.bfloat16, torch.float16):
        half = relaxed_bellman_ford(costs.to(dtype))
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), path, rtol=0, atol=0.1)
    assert relaxed_bellman_ford(costs[:0]).shape == (0, 3, 4, 5)
    assert relaxed_bellman_ford(torch.ones(1, 1)).tolist() == [[1.0]]
    # A while loop may not be entered at all: not with probability 1 - sigmoid(steepness).
    entered = relaxed_bellman_ford(torch.ones(1, 1), loop="while", steepness=2.0, max_steps=60)
    torch.testing.assert_close(entered, torch.sigmoid(torch.tensor([[2.0]])))


@every_loop
def test_compiles_to_one_graph(loop: str) -> None:
    costs = maps(2, 3, 4).requires_grad_()

    def loss(c: Tensor) -> Tensor:
        return relaxed_bellman_ford(c, loop=loop, iterations=4, max_steps=3).square().sum()

    value = torch.compile(loss, backend="aot_eager", fullgraph=True)(costs)
    torch.testing.assert_close(value, loss(costs))
    torch.testing.assert_close(torch.autograd.grad(value, costs), torch.autograd.grad(loss(costs), costs))


def test_around_and_its_adjoint() -> None:
    """<around(x), y> = <x, adjoint(y)>, also where the square is larger than x; and each sees its neighbours."""
    x = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
    seen = grid.around(x, 3, 5)
    assert torch.equal(seen[:, :, 1, 1].flatten(0, 1)[[0, 1, 5]], torch.stack([x[0, 0], x[0, 1], x[1, 2]]))
    assert not seen[2, :, 1:].any()
    assert not seen[:, 0, :, 0].any()
    assert torch.autograd.gradcheck(lambda t: grid.around(t, 3, 5), x)
    assert torch.autograd.gradgradcheck(lambda t: grid.around(t, 3, 5), x)


def test_what_it_refuses() -> None:
    costs = torch.ones(4, 5)
    with pytest.raises(ShapeError, match=r"costs must have shape \(\.\.\., h, w\) with h, w >= 1; got \(4,\)"):
        relaxed_bellman_ford(torch.ones(4))
    with pytest.raises(ArgumentTypeError, match=r"costs must have a floating-point dtype"):
        relaxed_bellman_ford(costs.long())
    with pytest.raises(ArgumentError, match=r"loop must be one of 'for', 'while'; got 'until'"):
        relaxed_bellman_ford(costs, loop="until")
    with pytest.raises(ArgumentError, match=r"steepness must be positive and finite; got 0"):
        relaxed_bellman_ford(costs, steepness=0.0)
    with pytest.raises(ArgumentError, match=r"iterations must be at least 5 for this map; got 4\. The default is 9"):
        relaxed_bellman_ford(costs, iterations=4)
    with pytest.raises(ArgumentTypeError, match=r"max_steps must be an integer or None; got 2\.5 of type float"):
        relaxed_bellman_ford(costs, max_steps=2.5)  # pyright: ignore
    assert math.isfinite(relaxed_bellman_ford(costs, iterations=5).sum())
