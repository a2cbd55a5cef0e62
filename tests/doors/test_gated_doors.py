"""``structure="gated"`` through the doors: works where the default rule works, and says what is unseen."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.twins import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import newton_plugin as npl
from newton_plugin._boundary.autograd_graph import edge_of
from newton_plugin._boundary.rows import layout_of
from newton_plugin._linalg import large_rows
from newton_plugin._step import compiled
from newton_plugin._step.heads import head_of

compiles = pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="the compiler of torch 2.6 gives up")


def hook(**options: Any) -> npl.LossHook:
    return npl.LossHook(structure="gated", **options)


def batch(seed: int, n: int = 16, d: int = 6, k: int = 4) -> tuple[Tensor, Tensor]:
    """All samples look alike, and a third of the labels is wrong: the gate opens."""
    g = torch.Generator().manual_seed(seed)
    x = 1 + torch.randn(n, d, generator=g, dtype=torch.float64) / 3
    wrong = torch.rand(n, generator=g) < 0.33
    return x, torch.where(wrong, torch.randint(1, k, (n,), generator=g), 0)


def linear(d: int = 6, k: int = 4) -> nn.Linear:
    """Its first class has nearly all samples."""
    torch.manual_seed(0)
    layer = nn.Linear(d, k).double()
    with torch.no_grad():
        layer.bias[0] += 2
    return layer


def gradient(door: npl.LossHook, net: nn.Module, seed: int, n: int = 16, scale: float = 1) -> Tensor:
    x, target = batch(seed, n)
    net.zero_grad()
    (door(F.cross_entropy(net(x), target)) * scale).backward()
    return torch.cat([p.grad.flatten().clone() for p in net.parameters() if p.grad is not None])


def warmed(net: nn.Module, steps: int = 30, **options: Any) -> npl.LossHook:
    """A hook whose gate is open."""
    door = hook(**options)
    for t in range(steps):
        gradient(door, net, t)
    assert door.diagnostics()["gate"] > 0.05
    return door


# --- what the loss is made of


def test_a_sum_is_the_mean_times_the_samples() -> None:
    net, mean, total = linear(), hook(), hook(reduction="sum")
    for t in range(20):
        x, target = batch(t)
        a = gradient(mean, net, t)
        net.zero_grad()
        total(F.cross_entropy(net(x), target, reduction="sum")).backward()
        b = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        assert relative_error(b, 16 * a) <= 1e-7


def test_ignored_rows_count_for_nothing() -> None:
    net, plain, padded = linear(), hook(), hook()
    for t in range(20):
        x, target = batch(t)
        a = gradient(plain, net, t)
        g = torch.Generator().manual_seed(t)
        more = 100 * torch.randn(5, 6, generator=g, dtype=torch.float64)
        net.zero_grad()
        ignored = torch.full((5,), -100)
        padded(F.cross_entropy(net(torch.cat([x, more])), torch.cat([target, ignored]))).backward()
        b = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        assert relative_error(b, a) <= 1e-7


def test_the_scale_of_a_backward_pass_and_accumulation_change_no_step() -> None:
    net = linear()
    one, scaled = hook(), hook()
    for t in range(20):
        a, b = gradient(one, net, t), gradient(scaled, net, t, scale=1024.0)
        assert relative_error(b, 1024 * a) <= 1e-12


def test_a_loss_with_one_value_for_each_sample() -> None:
    net, whole = linear(), hook()
    each = npl.newton_loss(functools.partial(F.cross_entropy, reduction="none"), structure="gated")
    for t in range(20):
        x, target = batch(t)
        a = gradient(whole, net, t)
        net.zero_grad()
        each(net(x), target).mean().backward()
        b = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        assert relative_error(b, a) <= 1e-12


def test_a_wrapped_loss_is_a_hooked_one() -> None:
    net, door, wrapped = linear(), hook(), npl.newton_loss(F.cross_entropy, structure="gated")
    for t in range(25):
        x, target = batch(t)
        a = gradient(door, net, t)
        net.zero_grad()
        wrapped(net(x), target).backward()
        assert torch.equal(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]), a)
    assert wrapped.diagnostics()["gate"] == door.diagnostics()["gate"] > 0


def test_one_step_of_a_function() -> None:
    x, target = batch(0)
    y = linear()(x).detach()
    taken = npl.newton_step(F.cross_entropy, y, target, structure="gated")
    torch.testing.assert_close(taken.step.square().sum(), taken.gradient.square().sum())
    named = npl.newton_step(F.cross_entropy, y, target, curvature=npl.GatedFisher())
    assert torch.equal(taken.step, named.step)


# --- batches


def test_batches_of_every_size() -> None:
    net, door = linear(), hook()
    for t, n in enumerate((3, 1, 16, 2, 7, 40, 1, 1) * 3):
        assert torch.isfinite(gradient(door, net, t, n)).all()
    door(net(torch.randn(0, 6, dtype=torch.float64)).square().sum()).backward()
    assert torch.isfinite(gradient(door, net, 0)).all()
    empty = hook()
    empty(net(torch.randn(0, 6, dtype=torch.float64)).square().sum()).backward()
    assert torch.isfinite(gradient(empty, net, 0)).all()


def test_a_batch_with_nan_keeps_its_gradient_and_changes_nothing() -> None:
    net = linear()
    door, other = warmed(net), warmed(net)
    x, target = batch(99)
    x[3, 2] = math.nan
    net.zero_grad()
    door(F.cross_entropy(net(x), target)).backward()
    assert net.weight.grad is not None
    assert torch.isnan(net.weight.grad).any()
    for t in range(3):
        assert torch.equal(gradient(door, net, t), gradient(other, net, t))


@pytest.mark.parametrize("zero", ["gradient", "loss"])
def test_batches_without_a_gradient_between_others(zero: str) -> None:
    net, door = linear(), hook()
    for t in range(30):
        if t % 3:
            assert torch.isfinite(gradient(door, net, t)).all()
            continue
        net.zero_grad()
        x, target = batch(t)
        (
            door((0 * net(x)).square().sum()) if zero == "gradient" else 0 * door(F.cross_entropy(net(x), target))
        ).backward()
        assert net.weight.grad is not None
        assert not net.weight.grad.any()


def test_a_second_pass_sends_the_step_once_more() -> None:
    net = linear()
    door = warmed(net)
    x, target = batch(99)
    net.zero_grad()
    loss = door(F.cross_entropy(net(x), target))
    loss.backward(retain_graph=True)
    assert net.weight.grad is not None
    first = net.weight.grad.clone()
    (2 * loss).backward()
    assert relative_error(net.weight.grad, 3 * first) <= 1e-12


def test_a_pass_after_one_of_a_loss_times_zero_looks_at_the_layer() -> None:
    net = linear()
    door, other = warmed(net), warmed(net)
    x, target = batch(99)
    net.zero_grad()
    loss = door(F.cross_entropy(net(x), target))
    (0 * loss).backward(retain_graph=True)
    net.zero_grad()
    loss.backward()
    a = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    assert relative_error(a, gradient(other, net, 99)) <= 1e-12


# --- formats


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_an_infinite_step_of_a_scaler(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    last, door = nn.Linear(8, 4), hook()
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), last)
    optimizer, scaler = torch.optim.SGD(net.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for t in range(25):
        x, target = batch(t)
        if t == 15:
            x[0, 0] = math.inf
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = door(F.cross_entropy(net(x.float()).float(), target))
        scaled: Any = scaler.scale(loss)
        scaled.backward()
        before = last.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(last.weight, before) == (t == 15)
    assert scaler.get_scale() == 2.0**11
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert door.boundaries[0].last_layer == "a layer of 8 inputs and 4 outputs"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("large", [False, True])
def test_half_precision_reads_what_float32_reads(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float, large: bool
) -> None:
    """Rows that are streamed, too: they arrive in half precision, in the unit of a scaled loss."""
    if large:
        monkeypatch.setattr(large_rows, "_LARGE", 16)
    net = linear().to(dtype)
    full, (half, wide) = copy.deepcopy(net).double(), (hook(), hook())
    for t in range(20):
        x, target = batch(t)
        x = x.to(dtype)
        net.zero_grad()
        full.zero_grad()
        (half(F.cross_entropy(net(x), target)) * 256).backward()
        wide(F.cross_entropy(full(x.double()), target)).backward()
    assert net.weight.grad is not None
    assert full.weight.grad is not None
    assert relative_error(net.weight.grad.double() / 256, full.weight.grad) <= 10 * tolerance
    shown, theirs = half.diagnostics(), wide.diagnostics()
    assert theirs["gate"] > 0.02
    assert shown["signal"] == pytest.approx(theirs["signal"], abs=tolerance)
    assert shown["gate"] == pytest.approx(theirs["gate"], abs=10 * tolerance)


def test_rows_that_are_streamed_have_the_steps_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = linear()
    small, large = hook(), hook()
    for t in range(25):
        a = gradient(small, net, t)
        with monkeypatch.context() as patch:
            patch.setattr(large_rows, "_LARGE", 16)
            patch.setattr(large_rows, "_PART_ELEMENTS", 12)
            b = gradient(large, net, t)
        assert relative_error(b, a) <= 1e-7
    assert large.diagnostics() == pytest.approx(small.diagnostics(), rel=1e-6)
    assert small.diagnostics()["gate"] > 0.05


def test_a_large_vocabulary_is_added_up() -> None:
    """2^19 numbers and more, and a layer whose gradient is too large to be kept as it is."""
    torch.manual_seed(0)
    net, door = nn.Linear(8, 9000), hook()
    for t in range(13):
        g = torch.Generator().manual_seed(t)
        x, target = torch.randn(64, 8, generator=g), torch.randint(2, (64,), generator=g)
        net.zero_grad()
        door(F.cross_entropy(net(x), target)).backward()
        assert net.weight.grad is not None
        assert torch.isfinite(net.weight.grad).all()
    state = next(iter(door.state_dict()["rules"].values()))["curvature"]["conflict"]
    assert state["metric"]["mean"].shape == (8 * 1800,)
    assert 0 < door.diagnostics()["signal"] < 1


# --- layers that are seen


@pytest.mark.parametrize(
    ("layer", "shape", "features", "seen"),
    [
        (nn.Conv2d(2, 3, 3, padding=1), (5, 2, 6, 6), None, "a layer of 18 inputs and 3 outputs at 36 positions"),
        (nn.Conv2d(2, 3, 3, padding=1), (5, 2, 6, 6), 1, "a layer of 18 inputs and 3 outputs"),
        (nn.Conv1d(2, 3, 3), (5, 2, 6), None, "a layer of 6 inputs and 3 outputs at 4 positions"),
        (nn.Linear(6, 3), (5, 7, 6), None, "a layer of 6 inputs and 3 outputs at 7 positions"),
        (nn.Linear(6, 3), (5, 7, 6), -1, "a layer of 6 inputs and 3 outputs"),
        (nn.Linear(6, 1), (5, 7, 6), None, "a layer of 6 inputs and 1 outputs at 7 positions"),
    ],
)
def test_layers_that_are_seen(layer: nn.Module, shape: tuple[int, ...], features: int | None, seen: str) -> None:
    layer, door = copy.deepcopy(layer).double(), hook(feature_dims=features)
    for t in range(12):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        door(layer(x).square().mean()).backward()
    assert door.boundaries[0].last_layer == seen
    assert 0 < door.diagnostics()["signal"] < 1
    assert "not evened out" not in repr(door)


def _checkpointed(reentrant: bool) -> Callable[[Tensor], Tensor]:
    body, net = linear(6, 6), linear()
    return lambda x: checkpoint(net, body(x), use_reentrant=reentrant)


def _bias_alone() -> nn.Module:
    net = linear()
    net.weight.requires_grad_(False)
    return net


UNSEEN: dict[str, tuple[Callable[[], Callable[[Tensor], Tensor]], str]] = {
    "checkpoint": (lambda: _checkpointed(False), "inside of a checkpoint"),
    "old checkpoint": (lambda: _checkpointed(True), "does not show what it computes"),
    "frozen weight": (_bias_alone, "weight of the last layer is frozen"),
    "normalised": (lambda: nn.Sequential(linear(), nn.LayerNorm(4)).double(), "no linear layer makes these outputs"),
    "leaf": (lambda: lambda x: x[:, :4].clone().requires_grad_(), "a leaf of the graph"),
    "groups": (lambda: nn.Conv1d(6, 4, 1, groups=2).double(), "a convolution in groups"),
}


@pytest.mark.parametrize("case", UNSEEN)
def test_what_is_unseen_is_said_and_evens_nothing_out(case: str) -> None:
    """The steps are those of a gate that is shut and of size "norm"."""
    if case == "checkpoint" and not hasattr(torch._C._autograd.SavedTensor, "unpack_hook"):
        pytest.skip("this torch does not show that a tensor would be computed anew: the layer is seen")
    make, reason = UNSEEN[case]
    net, doors = make(), (hook(), npl.LossHook(curvature=npl.GatedFisher(gate=0, size="norm")))
    for t in range(15):
        x, target = batch(t)
        x = x.unsqueeze(-1) if case == "groups" else x
        found = []
        for door in doors:
            y = net(x.clone())
            y = y.squeeze(-1) if case == "groups" else y
            kept = y * 1
            kept.retain_grad()
            door(F.cross_entropy(kept, target)).backward()
            assert kept.grad is not None
            found.append(kept.grad)
        assert relative_error(found[0], found[1]) <= 1e-12
    assert doors[0].boundaries[0].last_layer.startswith("samples are not evened out: ")
    assert reason in doors[0].boundaries[0].last_layer
    assert doors[0].boundaries[0].last_layer in repr(doors[0])
    assert doors[0].diagnostics()["gate"] == 0
    assert math.isnan(doors[0].diagnostics()["contradiction"])


@compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_network_is_not_seen() -> None:
    net, door = torch.compile(linear(), backend="aot_eager"), hook()
    x, target = batch(0)
    door(F.cross_entropy(net(x), target)).backward()
    assert "does not show what it computes" in door.boundaries[0].last_layer


def test_calls_of_one_layer_are_one_batch() -> None:
    """A layer called twice has the steps of one call on both inputs, whatever their order."""
    net, once, twice = linear(), hook(), hook()
    for t in range(25):
        (a, s), (b, u) = batch(t), batch(100 + t, 5)
        net.zero_grad()
        once(F.cross_entropy(net(torch.cat([a, b])), torch.cat([s, u]))).backward()
        assert net.weight.grad is not None
        want = net.weight.grad.clone()
        net.zero_grad()
        parts = [F.cross_entropy(net(a), s, reduction="sum"), F.cross_entropy(net(b), u, reduction="sum")]
        twice(sum(parts) / 21).backward()  # type: ignore[union-attr]
        assert relative_error(net.weight.grad, want) <= 1e-7
    assert [found.calls for found in twice.boundaries] == [2, 2]
    assert twice.diagnostics()["gate"] == pytest.approx(once.diagnostics()["gate"], rel=1e-6)
    assert once.diagnostics()["gate"] > 0


def test_calls_with_different_numbers_of_positions() -> None:
    """They are layers of their own; and where they are said to be one, the last layer is not seen."""
    net, door = linear(), hook()
    x = torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = net(x), net(x[:, :3])
    door((a.sum(1) - b.sum(1)).square().sum(-1).mean()).backward()
    seen = "a layer of 6 inputs and 4 outputs at {} positions"
    assert sorted(found.last_layer for found in door.boundaries) == [seen.format(3), seen.format(5)]
    ends: Any = [SimpleNamespace(graph_edge=edge_of(y)) for y in (net(x), net(x[:, :3]))]
    found = head_of(ends, [layout_of((8, 5, 4), None), layout_of((8, 3, 4), None)])
    assert found == "calls of the last layer have different numbers of positions"


# --- several boundaries


def test_what_one_term_counts_against_another_does_not_change() -> None:
    """Two heads of one loss, weights 1 and .01: ``<step, gradient> / |gradient|^2`` is the same at both."""
    torch.manual_seed(0)
    heads = nn.Linear(16, 4, bias=False).double(), nn.Linear(16, 2, bias=False).double()
    door, x = hook(), torch.eye(16, dtype=torch.float64)  # the gradients of the weights are those of the outputs
    sizes = []
    for t in range(30):
        z, target = batch(t)
        found = []
        for way in (door, lambda loss: loss):
            loss = way(F.cross_entropy(heads[0](x), target) + 0.01 * (heads[1](x) - z[:, :2]).square().mean())
            found.append(torch.autograd.grad(loss, [head.weight for head in heads]))
        gains = [float((s * g).sum() / g.square().sum()) for s, g in zip(*found, strict=True)]
        assert gains[0] == pytest.approx(gains[1], rel=1e-9)
        sizes.append(gains[0])
    assert sizes[0] == pytest.approx(1, rel=1e-2)  # samples above the most have less
    assert len({round(size, 6) for size in sizes}) > 20  # it does change
    assert [found.last_layer for found in door.boundaries] == [
        "a layer of 16 inputs and 4 outputs",
        "a layer of 16 inputs and 2 outputs",
    ]


def test_terms_beside_have_the_size_of_the_loss() -> None:
    torch.manual_seed(0)
    net, door, x = nn.Linear(16, 4, bias=False).double(), hook(), torch.eye(16, dtype=torch.float64)
    for t in range(20):
        _, target = batch(t)
        (g,) = torch.autograd.grad(F.cross_entropy(net(x), target), net.weight)
        loss = door(F.cross_entropy(net(x), target) + 0.1 * net.weight.square().sum())
        (found,) = torch.autograd.grad(loss, net.weight)
        term = 0.2 * net.weight.detach()
        # The classes of a cross entropy share their gradients: over all of them the step is zero.
        size = float((found.sum(0) * term.sum(0)).sum() / term.sum(0).square().sum())
        step = found - size * term
        assert float(step.sum(0).abs().max()) <= 1e-12
        assert size == pytest.approx(float((step * g).sum() / g.square().sum()), rel=1e-9)


def test_a_hook_after_a_hook() -> None:
    net, first, second, alone = linear(), hook(), hook(), hook()
    for t in range(15):
        x, target = batch(t)
        net.zero_grad()
        second(first(F.cross_entropy(net(x), target))).backward()
        assert net.weight.grad is not None
        assert torch.isfinite(net.weight.grad).all()
        assert torch.isfinite(gradient(alone, net, t)).all()


# --- copies and compiled steps


def test_copies_and_pickles_go_on_alone() -> None:
    net = linear()
    door = warmed(net)
    others = copy.deepcopy(door), pickle.loads(pickle.dumps(door))
    for t in range(40, 45):
        want = gradient(door, net, t)
        assert all(torch.equal(gradient(other, net, t), want) for other in others)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace, and make no machine code."""
    torch._dynamo.reset()
    compiled._STEPS.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()
    compiled._STEPS.clear()


SEEN: dict[str, Callable[[int], bool]] = {
    "always": lambda t: True,
    "never": lambda t: False,
    "at first": lambda t: t < 14,
    "later": lambda t: t >= 4,
    "in turn": lambda t: t % 3 != 1,
}


@compiles
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("seen", "saved"),
    [
        ("always", True),
        ("never", False),
        ("later", False),
        ("in turn", True),
        pytest.param("at first", True, marks=pytest.mark.slow),
        pytest.param("in turn", False, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_step_is_the_eager_one_whatever_is_seen(seen: str, saved: bool) -> None:
    """Without a warning, also where the state is looked at between steps."""
    net = linear()
    doors = hook(), hook(compile_step=True)
    for t in range(20):
        x, target = batch(t, (16, 16, 7)[t % 3])
        found = []
        for door in doors:
            y = net(x) if SEEN[seen](t) else checkpoint(net, x.requires_grad_(), use_reentrant=False)
            net.zero_grad()
            door(F.cross_entropy(y, target)).backward()
            assert net.weight.grad is not None
            found.append(net.weight.grad.clone())
            if saved:
                door.state_dict()
        assert relative_error(found[1], found[0]) <= 1e-7
    assert len(compiled._STEPS) == 1
    assert not any(step._off for step in compiled._STEPS.values())
    assert doors[1].diagnostics() == pytest.approx(doors[0].diagnostics(), rel=1e-6, abs=1e-9, nan_ok=True)
    assert doors[1].boundaries[0].last_layer == doors[0].boundaries[0].last_layer
    resumed = hook()
    resumed.load_state_dict(doors[1].state_dict())
    assert relative_error(gradient(resumed, net, 50), gradient(doors[0], net, 50)) <= 1e-7


@compiles
@pytest.mark.usefixtures("quick")
def test_an_optimizer_that_is_named_later_takes_the_compiled_step_along() -> None:
    net = linear()
    doors = hook(), hook(compile_step=True)
    optimizers = torch.optim.SGD(net.parameters(), 0.1), torch.optim.Adam(net.parameters())
    for t in range(16):
        for door in doors:
            if t % 4 == 2:
                door.set_optimizer(optimizers[t // 4 % 2])
        a, b = (gradient(door, net, t) for door in doors)
        assert relative_error(b, a) <= 1e-7
    assert not any(step._off for step in compiled._STEPS.values())
