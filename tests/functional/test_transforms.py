"""Under every transform, in any nesting, the steps are those of the live graph: losses, rules, running states."""

from __future__ import annotations

import itertools
import zlib
from typing import Any

import pytest
import torch
from tests.functional.losses import ALL, UNREDUCED, batches
from tests.functional.ways import DOOR, PURE, by_live_graph
from tests.twins import relative_error
from torch.func import jvp, linearize, vmap

import newton_plugin as npl

pytestmark = [
    pytest.mark.filterwarnings("ignore:newton_plugin uses the empirical Fisher:UserWarning"),
    # Of torch itself: in forward mode, for operations without a batching rule, and where linearize folds constants.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr:UserWarning"),
]

STRUCTURES = ("mean", "per_sample", "isotropic", "diagonal", "block")
DAMPINGS: tuple[Any, ...] = (
    "auto",
    0.05,
    npl.Tikhonov(0.2),
    npl.AutoDamping(ratio=1.0, decay=0.99, growth=2.0),
    npl.AutoDamping(floor=0.0, own=0.0),
    npl.AutoDamping(decay=0.0),
)
RULES: list[dict[str, Any]] = [
    {"curvature": c, "structure": s, "power": p, "damping": d}
    for c, s, p, d in itertools.product(("fisher", "hessian"), STRUCTURES, (1, 0.5), DAMPINGS)
] + [{"curvature": "norm"}, {"curvature": npl.SoftNormalization(c=0.3)}, {"curvature": "norm", "damping": 0.1}]
WAYS = {**{f"pure, {name}": way for name, way in PURE.items()}, **{f"door, {name}": way for name, way in DOOR.items()}}


def rules_for(name: str, count: int) -> list[dict[str, Any]]:
    """Some of the rules, other ones for each name; the default and the Hessian always."""
    start = zlib.crc32(name.encode()) % len(RULES)
    return [{}, {"curvature": "hessian"}] + [RULES[(start + 37 * k) % len(RULES)] for k in range(count)]


def check(name: str, rule: dict[str, Any], way: str, steps: int = 3) -> None:
    loss = ALL[name]
    data = batches(loss, steps)
    if "vmap(vmap" in way and name in NOT_NESTED:
        return
    if way.endswith(("vmap(grad)", "vmap(vmap(grad))", "grad(vmap)")) and name in DATA_DEPENDENT:
        with pytest.raises(npl.TransformError, match="cannot transform loss_fn"):
            WAYS[way](loss[0], data, **rule)
        return
    assert relative_error(WAYS[way](loss[0], data, **rule), by_live_graph(loss[0], data, **rule)) <= 1e-12, rule


# torch's own rule for two vmaps of mse_loss, huber_loss and smooth_l1_loss fails where one of them has no targets.
NOT_NESTED = {"mse", "huber", "huber_wide", "smooth_l1", "of_shape_one", "soft_rank", "bellman_ford"}
DATA_DEPENDENT = {"gaussian"}  # torch looks whether a variance is negative


@pytest.mark.parametrize("name", ALL)
def test_every_loss(name: str) -> None:
    ways = itertools.cycle(WAYS)
    for rule in rules_for(name, 2):
        for way in itertools.islice(ways, 3):
            check(name, rule, way)
    check(name, {}, "pure, vmap(grad)")


@pytest.mark.parametrize("way", WAYS)
def test_every_rule(way: str) -> None:
    """Each fifth rule for each way, beginning with another one: all rules are met."""
    for rule in RULES[sorted(WAYS).index(way) % 5 :: 5]:
        check("cross_entropy", rule, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ALL)
def test_every_loss_and_rule(name: str, way: str) -> None:
    """Each tenth rule, beginning with another one for each loss and way; all of them take most of an hour."""
    first = list(ALL).index(name) + sorted(WAYS).index(way)
    for rule in RULES[first % 10 :: 10]:
        check(name, rule, way)


@pytest.mark.parametrize("name", UNREDUCED)
def test_unreduced_losses(name: str) -> None:
    loss = UNREDUCED[name]
    data = batches(loss, 3)
    for rule in ({}, {"curvature": "hessian"}, {"structure": "mean", "reduction": "sum"}, {"curvature": "norm"}):
        expected = by_live_graph(loss[0], data, **rule)
        for way in ("pure, grad", "pure, jacfwd", "pure, vmap(grad)", "door, grad", "door, vmap(grad)"):
            assert relative_error(WAYS[way](loss[0], data, **rule), expected) <= 1e-12, (way, rule)


@pytest.mark.parametrize("feature_dims", [1, -1, (1, 2), (2, 1)])
def test_feature_dims(feature_dims: Any) -> None:
    def loss(y: torch.Tensor) -> torch.Tensor:
        return (torch.sin(y).square().sum((1, 2)) + y[..., 0].exp().sum(-1)).mean()

    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(3, 4, 2, generator=generator, dtype=torch.float64),) for _ in range(3)]
    for rule in ({}, {"structure": "mean"}, {"structure": "block"}, {"structure": "per_sample", "power": 0.5}):
        rule = {**rule, "feature_dims": feature_dims}
        expected = by_live_graph(loss, data, **rule)
        for way in ("pure, grad", "pure, jacfwd", "pure, vmap(grad)", "door, vmap(grad)"):
            assert relative_error(WAYS[way](loss, data, **rule), expected) <= 1e-12, (way, rule)


@pytest.mark.parametrize("rule", [{}, {"curvature": "hessian"}, {"curvature": "norm"}, {"structure": "mean"}], ids=str)
def test_linearize_and_jvp(rule: dict[str, Any]) -> None:
    """jvp(v) = <step, v>, and linearize has it as a linear function; also of many members."""
    loss = ALL["cross_entropy"]
    ((y, t),) = batches(loss, 1)
    newton = npl.functional.newton_loss(loss[0], **rule)
    state = newton.init(y)

    def f(v: torch.Tensor) -> torch.Tensor:
        return newton.apply(state, v, t)[0]

    step = by_live_graph(loss[0], [(y, t)], **rule)[0]
    value, slope = jvp(f, (y,), (y,))
    assert torch.equal(value, loss[0](y, t))
    torch.testing.assert_close(slope, (step * y).sum(), rtol=1e-12, atol=0)
    value, linear = linearize(f, y)
    assert torch.equal(value, loss[0](y, t))
    for v in (y, y.flip(0)):
        torch.testing.assert_close(linear(v), (step * v).sum(), rtol=1e-12, atol=1e-15)
    members = torch.stack([y, y.flip(0)])
    _, linear = linearize(lambda ys: vmap(f)(ys).sum(), members)
    steps = torch.stack([by_live_graph(loss[0], [(v, t)], **rule)[0] for v in members])
    torch.testing.assert_close(linear(members), (steps * members).sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("vectorize", [False, True])
def test_older_doors_of_torch(vectorize: bool) -> None:
    """``torch.autograd.functional``, ``forward_ad`` and gradients in batches take the same step."""
    loss = ALL["cross_entropy"]
    ((y, t),) = batches(loss, 1)
    newton = npl.functional.newton_loss(loss[0])
    step = by_live_graph(loss[0], [(y, t)])[0]

    def f(v: torch.Tensor) -> torch.Tensor:
        return newton.apply(newton.init(v), v, t)[0]

    jacobian = torch.autograd.functional.jacobian(f, y, vectorize=vectorize)
    assert relative_error(jacobian, step) <= 1e-12
    leaf = y.clone().requires_grad_()
    weights = torch.arange(3.0, dtype=y.dtype)
    (many,) = torch.autograd.grad(f(leaf), leaf, weights, is_grads_batched=True)
    assert relative_error(many, weights[:, None, None] * step) <= 1e-12
    for door in (f, lambda v: npl.newton_loss(loss[0])(v, t)):
        with torch.autograd.forward_ad.dual_level():
            loss_dual = door(torch.autograd.forward_ad.make_dual(y, y))
            tangent = torch.autograd.forward_ad.unpack_dual(loss_dual).tangent
        torch.testing.assert_close(tangent, (step * y).sum(), rtol=1e-12, atol=0)


def test_members_keep_their_own_states_at_the_door() -> None:
    """Under jacfwd the outputs are one batch though tangents are many; each size of a vmap has its own members."""
    loss = ALL["cross_entropy"]
    data = batches(loss, 4)
    newton = npl.newton_loss(loss[0])
    found = []
    for y, t in data:
        found.append(torch.func.jacfwd(lambda v, t=t: newton(v, t))(y))
        vmap(torch.func.grad(lambda v, t=t: newton(v, t)))(torch.stack([y.exp(), y.sin(), y.cos()]))
    assert relative_error(torch.stack(found), by_live_graph(loss[0], data)) <= 1e-12


def test_evaluation_inside_of_a_transform_takes_no_step() -> None:
    """Under ``no_grad`` a wrapped loss is the loss: the running state is not touched."""
    loss = ALL["cross_entropy"]
    data = batches(loss, 3)

    def train(evaluate: bool) -> torch.Tensor:
        newton, found = npl.newton_loss(loss[0]), []
        for y, t in data:

            def f(v: torch.Tensor, t: torch.Tensor = t) -> torch.Tensor:
                if evaluate:
                    with torch.no_grad():
                        newton(7 * v.sin(), t)
                return newton(v, t)

            found.append(torch.func.grad(f)(y))
        return torch.stack(found)

    assert torch.equal(train(True), train(False))
