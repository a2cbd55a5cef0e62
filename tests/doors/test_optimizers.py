"""What the doors know of the optimizer, and what the gated rule makes of it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin._doors.optimizers import is_memoryless


class Wrapper:
    """As Lightning and Accelerate wrap one."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2))]


SGD = torch.optim.SGD(parameters(), 0.1, momentum=0.9)
ADAM = torch.optim.AdamW(parameters(), 0.1)


@pytest.mark.parametrize(
    ("optimizer", "memoryless"),
    [
        (SGD, True),
        (torch.optim.ASGD(parameters()), True),
        (Wrapper(Wrapper(SGD)), True),
        ([SGD, SGD], True),
        (ADAM, False),
        (torch.optim.RMSprop(parameters()), False),
        ([SGD, ADAM], False),
        ([], False),
    ],
)
def test_who_remembers(optimizer: Any, memoryless: bool) -> None:
    assert is_memoryless(optimizer) is memoryless


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(npl.ArgumentTypeError, match=r"optimizer must be a torch.optim.Optimizer .*; got float"):
        npl.LossHook().set_optimizer(0.1)  # type: ignore[arg-type]
    with pytest.raises(npl.ArgumentTypeError, match=r"got str"):
        npl.newton_loss(nn.functional.mse_loss).set_optimizer("sgd")  # type: ignore[arg-type]


def _gradients(hook: npl.LossHook, optimizer: torch.optim.Optimizer | None = None, steps: int = 30) -> list[Tensor]:
    """Of gradients that shrink, with a clear signal."""
    torch.manual_seed(0)
    net, found = nn.Linear(4, 2).double(), []
    if optimizer is not None:
        hook.set_optimizer(optimizer)
    x, target = torch.randn(16, 4).double(), torch.randn(16, 2).double()
    for k in range(steps):
        net.zero_grad()
        hook((net(x) - target * 0.9**k).square().sum(-1).mean()).backward()
        assert net.weight.grad is not None
        found.append(net.weight.grad.clone())
        with torch.no_grad():
            net.weight -= 0.05 * net.weight.grad
    return found


@pytest.mark.parametrize(("optimizer", "size"), [(SGD, "plain"), (ADAM, "signal"), (None, "signal")])
def test_the_size_follows_the_optimizer(optimizer: torch.optim.Optimizer | None, size: Any) -> None:
    auto, named = npl.LossHook(structure="gated"), npl.LossHook(curvature=npl.GatedFisher(size=size))
    ours, theirs = _gradients(auto, optimizer), _gradients(named)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    other = _gradients(npl.LossHook(curvature=npl.GatedFisher(size="norm")))
    assert not torch.allclose(ours[-1], other[-1], rtol=1e-3) or size == "signal"


def test_a_size_that_is_named_stays() -> None:
    named = npl.LossHook(curvature=npl.GatedFisher(size="norm"))
    twin = npl.LossHook(curvature=npl.GatedFisher(size="norm"))
    assert all(torch.equal(a, b) for a, b in zip(_gradients(named, SGD), _gradients(twin), strict=True))


def test_copies_know_it_and_a_state_does_not() -> None:
    hook = npl.LossHook(structure="gated")
    _gradients(hook, SGD)
    for copied in (copy.deepcopy(hook), pickle.loads(pickle.dumps(hook))):
        assert copied._states.memoryless
    fresh = npl.LossHook(structure="gated")
    fresh.load_state_dict(hook.state_dict())
    assert not fresh._states.memoryless


def test_a_wrapped_loss_knows_it_too() -> None:
    torch.manual_seed(0)
    net, x, target = nn.Linear(4, 2), torch.randn(16, 4), torch.randn(16, 2)
    loss, named = (
        npl.newton_loss(nn.functional.mse_loss, curvature=npl.GatedFisher(size=s)) for s in ("auto", "plain")
    )
    loss.set_optimizer(SGD)
    for k in range(5):
        (ours,) = torch.autograd.grad(loss(net(x), target * 0.5**k), net.weight)
        (theirs,) = torch.autograd.grad(named(net(x), target * 0.5**k), net.weight)
        assert torch.equal(ours, theirs)
