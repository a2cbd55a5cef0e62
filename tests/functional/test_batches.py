"""Batches of every kind: empty, of one sample, masked, not finite, in half precision, of several outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.twins import relative_error
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

import newton_plugin as npl

pytestmark = pytest.mark.filterwarnings("ignore:newton_plugin:UserWarning")

Args = tuple[Tensor, ...]
RULES: list[dict[str, Any]] = [
    {},
    {"structure": "mean"},
    {"curvature": "hessian"},
    {"curvature": "norm"},
    {"structure": "per_sample", "power": 0.5},
    {"damping": 0.1},
]
G = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def classes(n: int, k: int = 3) -> Tensor:
    return torch.randint(0, k, (n,), generator=G)


def by_backward(apply: Callable[..., Tensor], args: Args) -> list[Tensor]:
    leaves = [a.clone().requires_grad_() if a.is_floating_point() else a for a in args]
    wanted = [a for a in leaves if a.requires_grad]
    inner = [a * 1 if a.requires_grad else a for a in leaves]
    found = torch.autograd.grad(apply(*inner).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(a) if g is None else g for a, g in zip(wanted, found, strict=True)]


def check(loss: Callable[..., Tensor], data: Sequence[Args], rule: dict[str, Any], tolerance: float = 1e-12) -> None:
    """Values to the bit; the gradients of all arguments, of three steps, by three ways, against the live graph."""
    live, door = npl.newton_loss(loss, **rule), npl.newton_loss(loss, **rule)
    pure = npl.functional.newton_loss(loss, **rule)
    state = pure.init(*data[0])
    states = tree_map(lambda t: torch.stack([t, t]), state)
    for args in data:
        which = tuple(k for k, a in enumerate(args) if a.is_floating_point())
        in_dims = tuple(0 if k in which else None for k in range(len(args)))
        twice = [torch.stack([a, a]) if k in which else a for k, a in enumerate(args)]
        expected = by_backward(live, args)
        value = loss(*args)

        def apply(s: Any, *given: Tensor) -> Any:
            out, after = pure.apply(s, *given)
            return out.sum(), (out, after)

        found, (out, after) = grad(apply, argnums=tuple(k + 1 for k in which), has_aux=True)(state, *args)
        torch.testing.assert_close(out, value, rtol=0, atol=0, equal_nan=True)
        members, (_, states) = vmap(
            grad(apply, argnums=tuple(k + 1 for k in which), has_aux=True), in_dims=(0, *in_dims)
        )(states, *twice)
        wrapped = grad(lambda *a: door(*a).sum(), argnums=which)(*args)
        before = state
        by_hand = by_backward(lambda *a: pure.apply(before, *a)[0], args)  # noqa: B023
        state = after
        for k, theirs in enumerate(expected):
            for ours in (found[k], members[k][1], wrapped[k], by_hand[k]):
                assert ours.dtype == theirs.dtype
                torch.testing.assert_close(torch.isfinite(ours), torch.isfinite(theirs))
                if theirs.numel():
                    scale = float(theirs.nan_to_num(0, 0, 0).abs().max())
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale, equal_nan=True)


def masked(n: int) -> Args:
    return randn(n, 3) + torch.tensor([0.0, 0.0, -torch.inf], dtype=torch.float64), classes(n, 2)


def with_nan() -> Args:
    y = randn(6, 3)
    y[2, 1] = torch.nan
    return y, classes(6)


def at_zero() -> Args:
    y = randn(6, 3).abs()
    y[1, 0] = 0
    return (y,)


def two_heads(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(a, t) + 0.5 * (b.square().sum(-1) + (a.sum(-1) * b.sum(-1)).cos()).mean()


def beside(y: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return F.cross_entropy(y, t) + 0.3 * w.square().sum() + (y * w).cosh().sum(-1).mean()


def summed(y: Tensor) -> Tensor:
    return y.cosh().sum()


CE = F.cross_entropy
BATCHES: dict[str, tuple[Callable[..., Tensor], list[Args]]] = {
    "one sample": (CE, [(randn(1, 3), classes(1)) for _ in range(3)]),
    "one feature": (F.mse_loss, [(randn(6, 1), randn(6, 1)) for _ in range(3)]),
    "vectors": (F.mse_loss, [(randn(6), randn(6)) for _ in range(3)]),
    "no sample": (summed, [(randn(0, 3),) for _ in range(2)]),
    "other sizes": (CE, [(randn(n, 3), classes(n)) for n in (6, 1, 9)]),
    "rows without gradient": (CE, [(randn(6, 3), classes(6).index_fill(0, torch.arange(2), -100)) for _ in range(3)]),
    "masked logits": (CE, [masked(6) for _ in range(3)]),
    "NaN between": (CE, [(randn(6, 3), classes(6)), with_nan(), (randn(6, 3), classes(6))]),
    "infinite slope": (lambda y: y.sqrt().sum(-1).mean(), [(randn(6, 3).abs(),), at_zero(), (randn(6, 3).abs(),)]),
    "zero gradient": (lambda y: (0 * y).square().sum(-1).mean(), [(randn(6, 3),) for _ in range(2)]),
    "piecewise linear": (lambda y: (y - 0.1).abs().sum(-1).mean(), [(randn(6, 3),) for _ in range(3)]),
    "other arguments": (beside, [(randn(6, 3), classes(6), randn(3)) for _ in range(3)]),
    "two samples of three strides": (CE, [(randn(6, 6)[:, ::2], classes(6)) for _ in range(3)]),
    "transposed": (CE, [(randn(3, 6).T, classes(6)) for _ in range(3)]),
}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_batches(name: str, rule: dict[str, Any]) -> None:
    check(*BATCHES[name], rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_several_outputs(rule: dict[str, Any]) -> None:
    data = [(randn(6, 3), randn(6, 2), classes(6)) for _ in range(3)]
    check(two_heads, data, {**rule, "outputs": (0, 1)})
    check(two_heads, data, {**rule, "outputs": ("b", "a")})
    empty = [(randn(6, 3), randn(0, 2), classes(6)) for _ in range(3)]
    check(lambda a, b, t: CE(a, t) + b.square().sum(), empty, {**rule, "outputs": (0, 1)})
    silent = [(randn(6, 3), randn(6, 2), classes(6)) for _ in range(3)]
    check(lambda a, b, t: CE(a, t) + (0 * b).square().sum(), silent, {**rule, "outputs": (0, 1)})


def test_outputs_by_name() -> None:
    """Keyword outputs, and a state that knows its arguments."""
    newton = npl.functional.newton_loss(CE, outputs="input")
    y, t = randn(6, 3), classes(6)
    gradient, _ = grad(lambda v: newton.apply(newton.init(input=v), input=v, target=t), has_aux=True)(y)
    expected = by_backward(npl.newton_loss(CE, outputs="input"), (y, t))[0]
    assert relative_error(gradient, expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("up", [False, True])
def test_less_precision(dtype: torch.dtype, up: bool) -> None:
    """The same step and dtype as by the live graph; the loss in that precision, or in float32."""
    data = [(randn(6, 3).to(dtype), classes(6)) for _ in range(3)]
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for rule in RULES:
        check((lambda y, t: CE(y.float(), t)) if up else CE, data, rule, tolerance)


def test_autocast() -> None:
    w = randn(3, 3).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for rule in RULES[:3]:
            check(lambda y, t: CE(y @ w, t), [(randn(6, 3).float(), classes(6)) for _ in range(3)], rule, 2e-2)


@pytest.mark.parametrize("features", [150, 1100])
@pytest.mark.parametrize("rule", [{}, {"structure": "mean"}, {"curvature": "norm"}, {"curvature": "hessian"}], ids=str)
def test_many_features(features: int, rule: dict[str, Any]) -> None:
    """Where C is never formed; the form of a mean Hessian is known from the loss."""
    data = [(randn(5, features), classes(5, features)) for _ in range(3)]
    check(CE, data, rule, 1e-10)


@pytest.mark.parametrize("damping", [0.1, 3.0])
def test_a_wide_hessian_that_is_zero(damping: float) -> None:
    """Nobody can turn to Fisher under vmap: its C is sketched, exactly where there are few samples."""
    torch.manual_seed(0)
    y, t = torch.randn(2, 6, 300, dtype=torch.float64), torch.randn(6, 300, dtype=torch.float64)
    rule: dict[str, Any] = {"curvature": "hessian", "damping": damping}
    found = vmap(lambda y: npl.newton_step(F.l1_loss, y, t, **rule).step)(y)
    expected = torch.stack([npl.newton_step(F.l1_loss, member, t, **rule).step for member in y])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("rule", [{"structure": "per_sample"}, {}, {"structure": "diagonal"}, {"power": 0.5}], ids=str)
@pytest.mark.parametrize("features", [20, 140])
def test_no_rule_takes_one_member_after_the_other(features: int, rule: dict[str, Any]) -> None:
    """torch warns where an operation has no rule for vmap, and a warning is an error here."""
    torch.manual_seed(0)
    y = torch.randn(2, 5, features, dtype=torch.float64)
    losses: list[tuple[Callable[..., Tensor], Tensor]] = [
        (F.cross_entropy, torch.randint(0, features, (5,))),
        (lambda y, t: (y.sin() * t).sum(-1).square().mean(), torch.randn(5, features, dtype=torch.float64)),
    ]
    for loss, t in losses:
        steps = vmap(lambda y: npl.newton_step(loss, y, t, curvature="hessian", **rule).step)(y)  # noqa: B023
        assert torch.isfinite(steps).all()
