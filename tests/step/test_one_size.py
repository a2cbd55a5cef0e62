"""The weights of a loss are its author's: one size for all that flows back, a shape at each boundary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import newton_plugin as npl

N = 12
RELATIVE: list[dict[str, Any]] = [
    {},
    {"structure": "mean"},
    {"curvature": "norm"},
    {"structure": "diagonal"},
    {"structure": "per_sample"},
    {"power": 0.5},
    {"curvature": "auto"},
]


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(5, 6)
        self.main, self.auxiliary = nn.Linear(6, 4), nn.Linear(6, 3)
        self.s = nn.Parameter(torch.tensor([0.3, -0.2]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.tanh(self.trunk(x))
        return self.main(h), self.auxiliary(h), h


X = torch.randn(N, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
T = torch.arange(N) % 3
Terms = Callable[[Any, int | None], list[Tensor]]


class Blocked(torch.autograd.Function):
    """The identity; no gradient passes, though the graph is there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return torch.zeros_like(grad)


class Trunk:
    """The trunk for term k: all of it if every term is asked for or this one; else no gradient reaches it."""

    def __init__(self, net: Any, only: int | None) -> None:
        self.net, self.only = net, only
        self.h = torch.tanh(net.trunk(X))

    def of(self, k: int) -> Tensor:
        return self.h if self.only in (None, k) else Blocked.apply(self.h)

    def weight(self, k: int) -> Tensor:
        return self.net.trunk.weight if self.only in (None, k) else Blocked.apply(self.net.trunk.weight)


def two_heads(net: Any, only: int | None = None) -> list[Tensor]:
    trunk = Trunk(net, only)
    return [F.cross_entropy(net.main(trunk.of(0)), T), F.cross_entropy(net.auxiliary(trunk.of(1)), T)]


def penalty_of_weights(net: Any, only: int | None = None) -> list[Tensor]:
    trunk = Trunk(net, only)
    return [F.cross_entropy(net.main(trunk.of(0)), T), trunk.weight(1).square().sum() + net.main.weight.square().sum()]


def penalty_of_activations(net: Any, only: int | None = None) -> list[Tensor]:
    trunk = Trunk(net, only)
    return [F.cross_entropy(net.main(trunk.of(0)), T), trunk.of(1).abs().mean()]


def policy_and_value(net: Any, only: int | None = None) -> list[Tensor]:
    """As in PPO; the entropy is a part of the policy's term: both are at one boundary."""
    trunk = Trunk(net, only)
    lp = net.main(trunk.of(0)).log_softmax(-1)
    advantage = torch.linspace(-2, 2, N, dtype=lp.dtype)
    policy = -(lp.gather(1, T[:, None])[:, 0] * advantage).mean() + 0.01 * (lp.exp() * lp).sum(-1).mean()
    return [policy, (net.auxiliary(trunk.of(1))[:, 0] - 3).square().mean()]


def uncertainty_weights(net: Any, only: int | None = None) -> list[Tensor]:
    trunk, s = Trunk(net, only), net.s
    a, b = net.main(trunk.of(0)), net.auxiliary(trunk.of(1))
    return [(-s[0]).exp() * F.cross_entropy(a, T) + s[0], (-s[1]).exp() * (b - 1).square().mean() + s[1]]


TERMS = [two_heads, penalty_of_weights, penalty_of_activations, policy_and_value, uncertainty_weights]


def trunk_gradient(net: Any) -> Tensor:
    return net.trunk.weight.grad.flatten().clone()


def shares(terms: Terms, weights: list[float], steps: int = 1, **options: Any) -> list[Tensor]:
    """Each term's part of the trunk's gradient: the loss is the same every time, one term alone reaches the trunk."""
    parts = []
    for only in range(len(weights)):
        hook = npl.LossHook(**options) if options.pop("hooked", True) else None
        net = TwoHeads().double()
        for _ in range(steps):
            net.zero_grad()
            loss = sum(w * v for w, v in zip(weights, terms(net, only), strict=True))
            assert isinstance(loss, Tensor)
            (loss if hook is None else hook(loss)).backward()
        parts.append(trunk_gradient(net))
        options["hooked"] = hook is not None
    return parts


@pytest.mark.parametrize("options", RELATIVE, ids=str)
def test_one_boundary_and_nothing_beside_it_is_the_step_of_its_rule(options: dict[str, Any]) -> None:
    found = []
    for door in (lambda f: npl.newton_loss(f, **options), lambda f: lambda y: npl.LossHook(**options)(f(y))):
        net = TwoHeads().double()
        door(lambda y: F.cross_entropy(y, T))(net(X)[0]).backward()
        found.append(trunk_gradient(net))
    assert torch.equal(*found)


@pytest.mark.parametrize("weight", [30.0, 1.0, 0.03, 0.001])
@pytest.mark.parametrize("terms", TERMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", RELATIVE, ids=str)
def test_a_terms_share_in_the_trunk_is_that_of_plain_training(
    options: dict[str, Any], terms: Terms, weight: float
) -> None:
    plain = [part.norm() for part in shares(terms, [1.0, weight], hooked=False)]
    taken = [part.norm() for part in shares(terms, [1.0, weight], **options)]
    ratio = float((taken[1] / taken[0]) / (plain[1] / plain[0]))
    assert 1 / 3 < ratio < 3, ratio


@pytest.mark.parametrize("terms", TERMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", RELATIVE, ids=str)
def test_shares_do_not_depend_on_the_weights_beyond_what_the_author_said(options: dict[str, Any], terms: Terms) -> None:
    """A term that counts ten times has ten times the part: exact where a step is linear in its loss's weight."""
    one, ten = (shares(terms, [1.0, w], **options) for w in (0.1, 1.0))
    ratio = float((ten[1].norm() / ten[0].norm()) / (one[1].norm() / one[0].norm()))
    assert ratio == pytest.approx(10, rel=1e-6)


@pytest.mark.parametrize("terms", TERMS, ids=lambda f: f.__name__)
def test_the_parts_of_all_terms_are_the_whole(terms: Terms) -> None:
    net = TwoHeads().double()
    a, b = terms(net, None)
    npl.LossHook()(a + 0.3 * b).backward()
    torch.testing.assert_close(trunk_gradient(net), sum(shares(terms, [1.0, 0.3])), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("structure", ["isotropic", "gated"])
def test_what_lies_beside_a_boundary_is_multiplied_by_the_gain_of_the_rule(structure: Any) -> None:
    net = TwoHeads().double()
    y = net(X)[0]
    npl.LossHook(structure=structure)(F.cross_entropy(y, T) + 0.5 * net.s.square().sum()).backward()
    step = npl.newton_step(F.cross_entropy, y.detach(), T, structure=structure)
    gain = (step.gradient * step.step).sum() / step.gradient.square().sum()
    torch.testing.assert_close(net.s.grad, gain * net.s.detach(), rtol=1e-12, atol=0)
    expected = TwoHeads().double()
    expected(X)[0].backward(step.step / N)
    torch.testing.assert_close(trunk_gradient(net), trunk_gradient(expected), rtol=1e-12, atol=0)


def test_with_a_fixed_damping_each_boundary_keeps_its_own_step_and_what_is_beside_stays_plain() -> None:
    net = TwoHeads().double()
    a, b, _ = net(X)
    npl.LossHook(damping=0.1)(F.cross_entropy(a, T) + 0.01 * F.cross_entropy(b, T) + net.s.square().sum()).backward()
    torch.testing.assert_close(net.s.grad, 2 * net.s.detach())
    expected = TwoHeads().double()
    ya, yb, _ = expected(X)
    steps = [
        npl.newton_step(lambda y, w=w: w * F.cross_entropy(y, T), y.detach(), damping=0.1).step / N
        for y, w in ((ya, 1.0), (yb, 0.01))
    ]
    torch.autograd.backward([ya, yb], steps)
    torch.testing.assert_close(trunk_gradient(net), trunk_gradient(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [65536.0, 0.25])
def test_the_size_follows_the_scale_of_a_grad_scaler_and_of_accumulation(scale: float) -> None:
    found = []
    for factor in (1.0, scale):
        net = TwoHeads().double()
        a, b = uncertainty_weights(net)
        (npl.LossHook()(a + b) * factor).backward()
        found.append(torch.cat([p.grad.flatten() / factor for p in net.parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_a_head_without_a_gradient_in_this_batch_keeps_its_say_from_batches_before() -> None:
    net, hook = TwoHeads().double(), npl.LossHook()
    sizes = []
    for margin in (5.0, -100.0, 5.0):
        net.zero_grad()
        a, b, _ = net(X)
        hook(F.cross_entropy(a, T) + F.relu(margin + b).mean() + net.s.sum()).backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in net.parameters() if p.grad is not None)
        sizes.append(float(net.s.grad[0]))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.5)


@pytest.mark.parametrize("options", [{}, {"curvature": "norm"}], ids=str)
def test_nothing_has_a_gradient(options: dict[str, Any]) -> None:
    net, hook = TwoHeads().double(), npl.LossHook(**options)
    for _ in range(2):
        net.zero_grad()
        a, b, _ = net(X)
        hook(F.relu(a - 100).mean() + F.relu(b - 100).mean() + net.s.sum()).backward()
        assert torch.equal(net.s.grad, torch.ones_like(net.s))
        assert not bool(trunk_gradient(net).any())


def test_where_one_boundary_is_not_finite_the_whole_loss_keeps_its_gradient() -> None:
    def loss_of(net: Any) -> Tensor:
        a, b, _ = net(X)
        return F.cross_entropy(a, T) + (b / torch.cat([torch.zeros(1), torch.ones(N - 1)])[:, None]).exp().mean()

    net, plain = TwoHeads().double(), TwoHeads().double()
    npl.LossHook()(loss_of(net)).backward()
    loss_of(plain).backward()
    torch.testing.assert_close(net.main.weight.grad, plain.main.weight.grad, rtol=1e-12, atol=0)
    assert not bool(torch.isfinite(net.trunk.weight.grad).all())


def test_the_gain_is_part_of_the_state() -> None:
    def train(hook: npl.LossHook, net: Any, steps: int) -> None:
        for k in range(steps):
            net.zero_grad()
            a, b = two_heads(net)
            hook((1 + k) * a + 0.01 * b).backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.1 * (0 if p.grad is None else p.grad)

    net, hook = TwoHeads().double(), npl.LossHook()
    train(hook, net, 3)
    resumed = npl.LossHook()
    resumed.load_state_dict(hook.state_dict())
    again = TwoHeads().double()
    again.load_state_dict(net.state_dict())
    train(hook, net, 2)
    train(resumed, again, 2)
    torch.testing.assert_close(trunk_gradient(net), trunk_gradient(again), rtol=1e-12, atol=0)


@pytest.mark.parametrize("options", RELATIVE, ids=str)
@pytest.mark.parametrize("weights", [(1.0, 0.001), (0.001, 1.0)])
def test_a_term_keeps_its_share_while_its_weight_changes(weights: tuple[float, float], options: dict[str, Any]) -> None:
    """In the very step after the change, whatever the running means still hold."""

    def norms(hooked: bool) -> list[float]:
        parts = []
        for only in range(2):
            net, hook = TwoHeads().double(), npl.LossHook(**options)
            for w in (weights[0],) * 5 + (weights[1],):
                net.zero_grad()
                a, b = two_heads(net, only)
                loss = a + w * b
                (hook(loss) if hooked else loss).backward()
            parts.append(float(trunk_gradient(net).norm()))
        return parts

    ours, plain = norms(True), norms(False)
    assert 1 / 3 < (ours[1] / ours[0]) / (plain[1] / plain[0]) < 3


def test_an_empty_batch_at_one_head_leaves_the_size_to_the_others_and_to_batches_before() -> None:
    net, hook, sizes = TwoHeads().double(), npl.LossHook(), []
    for rows in (N, 0, 0, N):
        net.zero_grad()
        a, _, _ = net(X)
        _, b, _ = net(X[:rows])
        hook(F.cross_entropy(a, T) + 0.1 * b.square().sum() + net.s.sum()).backward()
        sizes.append(float(net.s.grad[0]))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.2)
    assert sizes[2] == sizes[1]


def test_a_head_that_was_not_finite_once_does_not_keep_the_loss_plain_while_it_is_empty() -> None:
    def scaled(a: Tensor, b: Tensor, factor: float) -> Tensor:
        return F.cross_entropy(a, T) + 0.1 * factor * b.square().sum()

    door, net = npl.newton_loss(scaled, outputs=(0, 1), structure="isotropic"), TwoHeads().double()
    a, b, _ = net(X)
    door(a, b, float("inf")).backward()
    net.zero_grad()
    a, _, _ = net(X)
    _, b, _ = net(X[:0])
    door(a, b, 1.0).backward()
    plain = TwoHeads().double()
    F.cross_entropy(plain(X)[0], T).backward()
    assert float((trunk_gradient(net) - trunk_gradient(plain)).norm()) > 1e-3


def test_a_size_beyond_half_precision_does_not_overflow_where_its_product_with_the_scale_fits() -> None:
    """The size is some 1e7, more than float16 holds; a GradScaler has come down to 1e-3."""
    s = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))
    torch.manual_seed(0)
    net = nn.Linear(5, 3).half()
    hook = npl.LossHook(structure="isotropic")
    (hook((1e-2 * net(X.half())).square().sum(-1).mean() + s.sum()) * 1e-3).backward()
    assert bool(torch.isfinite(s.grad).all())
    assert float(s.grad) > 65  # 65504, the largest number of float16, times the scale
