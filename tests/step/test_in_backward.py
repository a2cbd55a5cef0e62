"""A rule that needs the loss's own gradient only takes it from the backward pass, and no pass of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.step.counted import Counted
from tests.twins import relative_error
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

import newton_plugin as npl
from newton_plugin._boundary.autograd_graph import explore, make_boundary
from newton_plugin._step.splice import Flow, splice

G = torch.Generator().manual_seed(0)
X = torch.randn(6, 5, generator=G, dtype=torch.float64)
T = torch.tensor([0, 1, 2, 3, 0, 1])

Loss = Callable[[Tensor], Tensor]


class SendsNothing(torch.autograd.Function):
    """Depends on its input, says it does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


LOSSES: dict[str, Loss] = {
    "one consumer": lambda y: F.cross_entropy(y, T),
    "the same consumer twice": lambda y: (y * y).sum(-1).square().mean(),
    "several consumers": lambda y: (y.unsqueeze(2) - y.unsqueeze(1)).abs().exp().mean() + y.square().mean(),
    "a Function of the user's among several": lambda y: (Counted.apply(y) - y.sum(-1, keepdim=True)).square().mean(),
    "one of several sends nothing": lambda y: SendsNothing.apply(y).mean() + y.exp().mean(),
    "one of several sends nothing, the other way round": lambda y: y.exp().mean() + SendsNothing.apply(y).mean(),
    "in place": lambda y: (y * 1).mul_(2).square().mean() + y.mean(),
}


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def gradient(loss_of: Loss, door: str, scale: float = 1.0, **options: Any) -> Tensor:
    net = model()
    y = net(X)
    loss = npl.LossHook(**options)(loss_of(y)) if door == "hook" else npl.newton_loss(loss_of, **options)(y)
    (scale * loss).backward()
    return flat(net)


@pytest.mark.parametrize("options", [{}, {"damping": 0.1}, {"curvature": "norm"}, {"structure": "per_sample"}])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("door", ["hook", "wrapper"])
def test_it_is_the_step_that_a_pass_of_its_own_gives(name: str, door: str, options: dict[str, Any]) -> None:
    """``on_nonfinite="raise"`` computes it beforehand."""
    for scale in (1.0, 65536.0, 0.25):
        before = gradient(LOSSES[name], door, scale, on_nonfinite="raise", **options)
        assert relative_error(gradient(LOSSES[name], door, scale, **options), before) <= 1e-12
        assert bool(before.any())


@pytest.mark.parametrize(
    ("options", "passes"),
    [({}, 1), ({"curvature": "norm"}, 1), ({"on_nonfinite": "raise"}, 2), ({"reduction": "sum"}, 1)],
)
def test_the_loss_is_differentiated_once(options: dict[str, Any], passes: int) -> None:
    net = model()
    Counted.passes = 0
    npl.newton_loss(lambda y: Counted.apply(F.cross_entropy(y, T)), **options)(net(X)).backward()
    assert Counted.passes == passes


def exp_plus(y: Tensor) -> Tensor:
    return (y.exp() + y).mean()


def test_a_known_hessian_costs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pass of its own")

    net, known, several = model(), npl.LossHook(curvature="hessian", damping=0.1), npl.LossHook()
    for _ in range(5):  # at the first steps the hook looks whether others share the loss's operations
        known(F.cross_entropy(net(X), T)).backward()
        several(exp_plus(net(X))).backward()
    monkeypatch.setattr(torch.autograd, "grad", refuse)
    known(F.cross_entropy(net(X), T)).backward()
    npl.newton_loss(F.cross_entropy, curvature="hessian", damping=0.1)(net(X), T).backward()
    several(exp_plus(net(X))).backward()
    with pytest.raises(AssertionError, match="a pass of its own"):
        npl.LossHook(curvature="hessian")(net(X).exp().mean())


@pytest.mark.parametrize(
    ("structure", "mean"),
    [("isotropic", lambda state: state), ("gated", lambda state: state["mean"])],
    ids=["isotropic", "gated"],
)
def test_every_further_backward_pass_sends_the_same_step(structure: Any, mean: Callable[[Any], Any]) -> None:
    net, hook = model(), npl.LossHook(structure=structure)
    loss = hook(LOSSES["several consumers"](net(X)))
    found = []
    for scale in (1.0, 1.0, 3.0):
        net.zero_grad()
        (scale * loss).backward(retain_graph=True)
        found.append(flat(net))
    assert torch.equal(found[0], found[1])
    assert relative_error(found[2], 3 * found[0]) <= 1e-14
    state = hook.state_dict()["rules"]
    (rule,) = state.values()
    assert float(mean(rule["curvature"])["count"]) == 1, "one batch, counted once"


def test_a_pass_to_some_parameters_only() -> None:
    net = model()
    whole = gradient(LOSSES["several consumers"], "hook")
    loss = npl.LossHook()(LOSSES["several consumers"](net(X)))
    parts = torch.autograd.grad(loss, list(net[2].parameters()), retain_graph=True)  # type: ignore[index]
    assert relative_error(torch.cat([p.flatten() for p in parts]), whole[-parts[0].numel() - 4 :]) <= 1e-12
    loss.backward()
    assert relative_error(flat(net), whole) <= 1e-12


def test_a_loss_multiplied_by_zero_sends_zeros_and_teaches_nothing() -> None:
    net, hook = model(), npl.LossHook()
    for weight in (1.0, 0.0, 1.0):
        net.zero_grad()
        (weight * hook(F.cross_entropy(net(X), T))).backward()
        if weight == 0:
            assert bool((flat(net) == 0).all())
    once = npl.LossHook()
    for _ in range(2):
        net.zero_grad()
        once(F.cross_entropy(net(X), T)).backward()
    assert hook.diagnostics()["damping"] == once.diagnostics()["damping"]


def test_two_boundaries_take_their_steps_in_one_pass() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 4), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = torch.tanh(self.body(x))
            return self.a(hidden), self.b(hidden)

    def run(**options: Any) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = TwoHeads().double()
        a, b = net(X)
        npl.LossHook(**options)(F.cross_entropy(a, T) + (b.square().sum(-1) * a.exp().mean(-1)).mean()).backward()
        return flat(net)

    assert relative_error(run(), run(on_nonfinite="raise")) <= 1e-12


def test_a_step_that_cannot_be_sent_is_an_error_and_not_a_zero() -> None:
    """Cannot happen to a boundary that is not called certain by mistake; here it is."""
    y = X.clone().requires_grad_() * 1.0
    edge = get_gradient_edge(y)
    at = (edge.node, edge.output_nr)
    loss = SendsNothing.apply(y).mean() + y.exp().mean()
    boundary = make_boundary("y", at, explore(loss.grad_fn, at.__eq__))
    assert not boundary.certain

    class Waiting:
        waits = True

        def receive(self, gradient: Tensor, scale: Tensor) -> None:
            raise AssertionError("never")

        def send(self, scale: Tensor) -> Tensor:
            raise AssertionError("never")

    splice(loss, [dataclasses.replace(boundary, certain=True)], [Waiting()], Flow())
    with pytest.raises(npl.NoGradientError, match="sends no gradient to the outputs though others do"):
        loss.backward()
