"""``structure="gated"`` with ``layer_inputs`` in pure functions: the steps of the live graph, under every transform."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.twins import relative_error
from torch import Tensor, nn
from torch.func import grad, jacrev, jvp, linearize, vmap
from torch.utils._pytree import tree_map

import newton_plugin as npl

pytestmark = [
    # Of torch itself: in forward mode, for operations without a batching rule, and where linearize folds constants.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr:UserWarning"),
]
MEMBERS, STEPS = 3, 25


def batch(seed: int, n: int = 16) -> tuple[Tensor, Tensor]:
    """All samples look alike, and a third of the labels is wrong: the gate opens."""
    g = torch.Generator().manual_seed(seed)
    x = 1 + torch.randn(n, 6, generator=g, dtype=torch.float64) / 3
    wrong = torch.rand(n, generator=g) < 0.33
    return x, torch.where(wrong, torch.randint(1, 4, (n,), generator=g), 0)


def weights(count: int = MEMBERS) -> Tensor:
    """Their first class has nearly all samples."""
    g = torch.Generator().manual_seed(0)
    first = torch.tensor([[2.0 / 6], [0.0], [0.0], [0.0]], dtype=torch.float64)
    return first + torch.randn(count, 4, 6, generator=g, dtype=torch.float64) / 10


def pure(**options: Any) -> Any:
    return npl.functional.newton_loss(F.cross_entropy, structure="gated", layer_inputs="h", **options)


def trained(newton: Any, w: Tensor, steps: int = STEPS) -> Any:
    """A state whose gate is open."""
    x, target = batch(0)
    state = newton.init(x @ w.T, h=x)
    for t in range(steps):
        x, target = batch(t)
        _, state = newton.apply(state, x @ w.T, target, h=x)
    return state


def test_an_ensemble_is_single_hooks() -> None:
    newton, w = pure(), weights()
    x, _ = batch(0)
    states = vmap(lambda w: newton.init(x @ w.T, h=x))(w)
    layers, hooks = [nn.Parameter(one.clone()) for one in w], [npl.LossHook(structure="gated") for _ in w]
    for t in range(STEPS):
        x, target = batch(t, (16, 9)[t % 2])

        def loss(w: Tensor, state: Any) -> Any:
            return newton.apply(state, x @ w.T, target, h=x)  # noqa: B023

        found, states = vmap(grad(loss, has_aux=True))(w, states)
        for k, layer in enumerate(layers):
            layer.grad = None
            hooks[k](F.cross_entropy(x @ layer.T, target)).backward()
            assert layer.grad is not None
            assert relative_error(found[k], layer.grad) <= 1e-7
    assert all(hook.diagnostics()["gate"] > 0.02 for hook in hooks)


def test_a_state_goes_to_a_hook_and_back() -> None:
    newton, (w,) = pure(), weights(1)
    state = trained(newton, w)
    x, target = batch(50)
    hook, layer = npl.LossHook(structure="gated"), nn.Parameter(w.clone())
    hook.load_state_dict(newton.state_dict(state))
    hook(F.cross_entropy(x @ layer.T, target)).backward()
    found, after = grad(lambda w: newton.apply(state, x @ w.T, target, h=x), has_aux=True)(w)
    assert layer.grad is not None
    assert relative_error(found, layer.grad) <= 1e-10
    back = newton.load_state_dict(hook.state_dict(), x @ w.T, h=x)
    for kind in ("curvature", "damping"):
        torch.testing.assert_close(back.rules["0"][kind], after.rules["0"][kind], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("way", ["backward", "jacrev", "jvp", "linearize", "vmap"])
def test_every_transform_has_the_step(way: str) -> None:
    newton, (w,) = pure(), weights(1)
    state = trained(newton, w)
    x, target = batch(50)

    def loss(w: Tensor) -> Tensor:
        return newton.apply(state, x @ w.T, target, h=x)[0]

    want = grad(loss)(w)
    towards = torch.linspace(-1, 1, w.numel(), dtype=torch.float64).reshape(w.shape)
    inner = (want * towards).sum()
    if way == "backward":
        leaf = w.clone().requires_grad_()
        loss(leaf).backward()
        torch.testing.assert_close(leaf.grad, want, rtol=1e-12, atol=1e-14)
    elif way == "jacrev":
        torch.testing.assert_close(jacrev(loss)(w), want, rtol=1e-12, atol=1e-14)
    elif way == "jvp":
        torch.testing.assert_close(jvp(loss, (w,), (towards,))[1], inner, rtol=1e-12, atol=1e-14)
    elif way == "linearize":
        torch.testing.assert_close(linearize(loss, w)[1](towards), inner, rtol=1e-12, atol=1e-14)
    else:
        found = vmap(grad(loss))(torch.stack([w, w]))
        torch.testing.assert_close(found, torch.stack([want, want]), rtol=1e-12, atol=1e-14)
    assert torch.equal(loss(w), F.cross_entropy(x @ w.T, target))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="the compiler of torch 2.6 does not follow the rules")
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch")
def test_a_whole_graph_of_the_compiler() -> None:
    newton, (w,) = pure(), weights(1)

    def step(w: Tensor, state: Any, x: Tensor, target: Tensor) -> Any:
        return grad(lambda w: newton.apply(state, x @ w.T, target, h=x), has_aux=True)(w)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    x, _ = batch(0)
    start = torch.compile(lambda x, w: newton.init(x @ w.T, h=x), fullgraph=True, backend="aot_eager")
    state = newton.init(x @ w.T, h=x)
    torch.testing.assert_close(start(x, w), state, rtol=0, atol=0, equal_nan=True)
    for t in range(15):
        x, target = batch(t)
        ours, theirs = compiled(w, state, x, target), step(w, state, x, target)
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)
        state = theirs[1]


def test_lists_have_positions() -> None:
    """(N, T, d) to (N, T): the live graph finds the same layer by itself."""
    newton = npl.functional.newton_loss(F.mse_loss, structure="gated", layer_inputs="h")
    torch.manual_seed(0)
    layer, hook, state = nn.Linear(6, 1).double(), npl.LossHook(structure="gated"), None
    for t in range(20):
        g = torch.Generator().manual_seed(t)
        x = torch.randn(8, 5, 6, generator=g, dtype=torch.float64)
        target = x.sum(-1) * torch.where(torch.arange(8) < 3, -3.0, 1.0).unsqueeze(-1)
        y = layer(x).squeeze(-1)
        state = newton.init(y, h=x) if state is None else state
        loss, state = newton.apply(state, y, target, h=x)
        (ours,) = torch.autograd.grad(loss, layer.weight)
        (theirs,) = torch.autograd.grad(hook(F.mse_loss(layer(x).squeeze(-1), target)), layer.weight)
        assert relative_error(ours, theirs) <= 1e-7
    assert hook.diagnostics()["gate"] > 0.05


def test_tokens_are_samples_where_the_features_say_so() -> None:
    newton = npl.functional.newton_loss(
        lambda y, t: F.cross_entropy(y.flatten(0, 1), t.flatten()), structure="gated", layer_inputs="h", feature_dims=-1
    )
    flat, (w,) = pure(), weights(1)
    states: list[Any] = [None, None]
    for t in range(15):
        x, target = batch(t, 20)
        wide = x.reshape(4, 5, 6)
        if not t:
            states = [newton.init(wide @ w.T, h=wide), flat.init(x @ w.T, h=x)]
        found = []
        for k, (door, inputs, labels) in enumerate(((newton, wide, target.reshape(4, 5)), (flat, x, target))):
            call = lambda w: door.apply(states[k], inputs @ w.T, labels, h=inputs)  # noqa: B023, E731
            g, states[k] = grad(call, has_aux=True)(w)
            found.append(g)
        assert relative_error(found[0], found[1]) <= 1e-7


def test_an_empty_batch_has_no_step_and_changes_nothing() -> None:
    newton = npl.functional.newton_loss(lambda y: y.cosh().sum(), structure="gated", layer_inputs="h", reduction="sum")
    (w,) = weights(1)
    for shape in ((0, 6), (0, 5, 6)):
        none, some = torch.zeros(shape, dtype=torch.float64), torch.ones(3, *shape[1:], dtype=torch.float64)
        state = newton.init(none @ w.T, h=none)
        torch.testing.assert_close(state, newton.init(some @ w.T, h=some), rtol=0, atol=0, equal_nan=True)
        _, after = newton.apply(state, none @ w.T, h=none)
        torch.testing.assert_close(after, state, rtol=0, atol=0, equal_nan=True)


def test_without_the_inputs_nothing_is_evened_out() -> None:
    blind = npl.functional.newton_loss(F.cross_entropy, structure="gated")
    shut = npl.functional.newton_loss(F.cross_entropy, curvature=npl.GatedFisher(gate=0, size="norm"))
    (w,) = weights(1)
    x, target = batch(0)
    states = [door.init(x @ w.T) for door in (blind, shut)]
    for t in range(15):
        x, target = batch(t)
        found = []
        for k, door in enumerate((blind, shut)):
            call = lambda w: door.apply(states[k], x @ w.T, target)  # noqa: B023, E731
            g, states[k] = grad(call, has_aux=True)(w)
            found.append(g)
        assert relative_error(found[0], found[1]) <= 1e-12


def test_rules_that_do_not_look_take_no_notice_of_the_inputs() -> None:
    plain = npl.functional.newton_loss(F.cross_entropy)
    given = npl.functional.newton_loss(F.cross_entropy, layer_inputs="h")
    (w,), (x, target) = weights(1), batch(0)
    a = grad(lambda w: plain.apply(plain.init(x @ w.T), x @ w.T, target)[0])(w)
    b = grad(lambda w: given.apply(given.init(x @ w.T, h=x), x @ w.T, target, h=x)[0])(w)
    assert torch.equal(a, b)


def test_wrong_arguments() -> None:
    newton, (w,), (x, target) = pure(), weights(1), batch(0)
    y = x @ w.T
    state = newton.init(y, h=x)
    with pytest.raises(npl.ArgumentError, match="h must be given by name, as layer_inputs='h' says"):
        newton.apply(state, y, target)
    with pytest.raises(npl.ArgumentError, match="h must be given by name"):
        newton.init(y)
    for wrong in (x[:5], x.reshape(-1), x.reshape(2, 8, 6)[:1], torch.zeros(16, 3, 6)):
        with pytest.raises(npl.ShapeError, match=r"layer_inputs must be \(N, ..., d\)"):
            newton.apply(state, y, target, h=wrong)
    with pytest.raises(npl.ShapeError, match="does not fit outputs"):
        newton.apply(state, y, target, h=x[:, :5])
    with pytest.raises(npl.ArgumentTypeError, match="layer_inputs must be the name of an argument"):
        npl.functional.newton_loss(F.cross_entropy, layer_inputs=3)  # type: ignore[arg-type]
    with pytest.raises(npl.ArgumentError, match="layer_inputs='h' is of one layer; got outputs="):
        npl.functional.newton_loss(F.cross_entropy, layer_inputs="h", outputs=(0, 1))
    other = npl.functional.newton_loss(F.cross_entropy, structure="isotropic")
    with pytest.raises(npl.ArgumentError, match="is none of curvature=GatedFisher"):
        newton.apply(other.init(y), y, target, h=x)
    with pytest.raises(npl.ArgumentError, match="members of a vmap"):
        newton.apply(tree_map(lambda t: torch.stack([t, t]), state), y, target, h=x)
