"""The host's time for a step, by a clock of the test's own; and what is said of a Hessian that takes long."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin._curvature.fisher import EmpiricalFisher
from newton_plugin._curvature.hessian import Hessian
from newton_plugin._doors import host_time


class Clock:
    """Stands still but where the test moves it."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(host_time, "now", found)
    return found


def slow(monkeypatch: pytest.MonkeyPatch, kind: type, clock: Clock, seconds: float) -> None:
    """Each step of this curvature that computes C takes so long."""
    step = kind.step

    def taking(self: Hessian, *args: object, **kwargs: object) -> object:
        if self.wants_hessian(2) or kind is not Hessian:
            clock.time += seconds
        return step(self, *args, **kwargs)

    monkeypatch.setattr(kind, "step", taking)


def train(hook: npl.LossHook, clock: Clock, steps: int, rest: float) -> list[str]:
    """The warnings of a training whose steps take ``rest`` seconds beside the hook."""
    torch.manual_seed(0)
    net, x = nn.Linear(3, 2).double(), torch.randn(8, 3, dtype=torch.float64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            hook(net(x).exp().mean()).backward()
            clock.time += rest
    return [str(w.message) for w in caught]


def test_a_dear_hessian_is_said_once_with_the_remedy(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, Hessian, clock, 0.2)
    said = train(npl.LossHook(curvature="hessian"), clock, 120, 0.01)
    assert len(said) == 1
    assert "takes 20 times the rest of a training step (200 ms beside 10 ms of the host)" in said[0]
    assert "Take curvature=npl.Hessian(refresh_every=10)" in said[0]
    assert "curvature='fisher', which needs no second derivative" in said[0]


def test_the_remedy_fits_what_is_there(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, Hessian, clock, 0.2)
    often = train(npl.LossHook(curvature=npl.Hessian(refresh_every=3)), clock, 30, 0.01)
    each = train(npl.LossHook(curvature="hessian", structure="per_sample"), clock, 30, 0.01)
    assert "npl.Hessian(refresh_every=30)" in often[0]
    assert "Leave out structure='per_sample', whose matrices are new with every sample" in each[0]


@pytest.mark.parametrize(
    ("step", "rest", "steps"),
    [(0.2, 0.05, 120), (0.009, 0.0001, 120), (0.2, 0.01, 23)],
    ids=["four times the rest", "nine milliseconds", "not for long enough"],
)
def test_nothing_is_said_of_one_that_is_not(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, step: float, rest: float, steps: int
) -> None:
    slow(monkeypatch, Hessian, clock, step)
    assert train(npl.LossHook(curvature="hessian"), clock, steps, rest) == []


def test_the_first_steps_do_not_count(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Much is compiled in them."""
    slow(monkeypatch, Hessian, clock, 0.0)
    hook = npl.LossHook(curvature="hessian")
    clock.time += 100
    hook(nn.Linear(3, 2).double()(torch.randn(8, 3).double()).exp().mean()).backward()
    assert train(hook, clock, 119, 0.01) == []


@pytest.mark.parametrize("rule", [EmpiricalFisher, Hessian])
def test_the_step_is_timed_where_it_is_made(rule: type, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fisher's in the backward pass, the Hessian's at once; nothing else of the backward pass counts."""

    class Slow(torch.autograd.Function):
        """A network below the outputs, and an operation of the loss, that take long."""

        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
            clock.time += 1000 if torch.is_grad_enabled() else 10
            return grad

    slow(monkeypatch, rule, clock, 3.0)
    hook = npl.LossHook(curvature=rule())
    net = nn.Linear(3, 2).double()
    hidden = Slow.apply(torch.randn(8, 3).double().requires_grad_())
    loss = net(hidden).exp().mean()
    with hook.timed() as time:
        hook(loss)
    assert time.seconds == (3.0 if rule is Hessian else 0.0)
    loss.backward()
    assert time.seconds == 3.0
    assert clock.time == 13.0


def test_outside_of_timed_nobody_counts(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch, EmpiricalFisher, clock, 3.0)
    hook, net = npl.LossHook(structure="isotropic"), nn.Linear(3, 2)
    with hook.timed() as time:
        pass
    hook(F.mse_loss(net(torch.randn(8, 3)), torch.randn(8, 2))).backward()
    assert clock.time == 3.0
    assert time.seconds == 0.0
