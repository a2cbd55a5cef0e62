"""``NewtonLoss`` among other modules: copies, pickles, devices and dtypes, containers, checkpoints, ``repr``."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import newton_plugin as npl


def loss_module(**options: Any) -> npl.NewtonLoss:
    return npl.NewtonLoss(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5])), **options)


def outputs(scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(6, 3, generator=torch.Generator().manual_seed(0))).requires_grad_()


TARGET = torch.arange(6) % 3


def gradient(criterion: nn.Module, scale: float = 1.0) -> Tensor:
    y = outputs(scale)
    criterion(y, TARGET).backward()
    assert y.grad is not None
    return y.grad


def saved(criterion: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(criterion, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), saved]


@pytest.mark.parametrize("copied", COPIES, ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("curvature", ["fisher", "hessian", "norm"])
def test_a_copy_goes_on_from_the_same_running_state(copied: Any, curvature: str) -> None:
    criterion = loss_module(curvature=curvature)
    gradient(criterion)
    other = copied(criterion)
    assert torch.equal(gradient(other, 2.0), gradient(criterion, 2.0))
    gradient(other, 5.0)  # the original does not notice
    expected, fresh = gradient(criterion, 3.0), loss_module(curvature=curvature)
    for scale in (1.0, 2.0):
        gradient(fresh, scale)
    assert torch.equal(gradient(fresh, 3.0), expected)


def test_moves_with_to() -> None:
    criterion = loss_module(damping=0.1).to(torch.float64)
    assert criterion.loss_fn.weight.dtype == torch.float64
    y = outputs().detach().double().requires_grad_()
    criterion(y, TARGET).backward()
    assert y.grad is not None
    assert torch.allclose(y.grad.float(), gradient(loss_module(damping=0.1)), atol=1e-6)
    assert criterion.to("meta").loss_fn.weight.device.type == "meta"


def test_running_state_follows_the_outputs_dtype() -> None:
    criterion = npl.NewtonLoss(nn.CrossEntropyLoss())
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        y = outputs().detach().to(dtype).requires_grad_()
        criterion(y, TARGET).backward()
        assert y.grad is not None
        assert y.grad.dtype == dtype
        assert y.grad.isfinite().all()


class Both(nn.Module):
    """A model that keeps its losses in containers, as many do."""

    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.net = nn.Linear(4, 3)
        self.losses = nn.ModuleDict({"main": wrap(nn.CrossEntropyLoss(weight=torch.ones(3)))})
        self.more = nn.ModuleList([wrap(nn.functional.cross_entropy)]) if wrap is npl.NewtonLoss else nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        return self.losses["main"](self.net(x), TARGET)


def test_in_containers() -> None:
    model = Both(npl.NewtonLoss)
    assert {"losses.main", "losses.main.loss_fn", "more.0"} <= {name for name, _ in model.named_modules()}
    model(torch.randn(6, 4)).backward()
    model.apply(lambda module: None)
    model.double()
    assert model.losses["main"].loss_fn.weight.dtype == torch.float64  # type: ignore[union-attr]
    assert not model.eval().losses["main"].training


def test_behind_a_network_in_sequence() -> None:
    """``Sequential(net, loss)``: one argument goes in, the loss comes out."""
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(4, 3), npl.newton_loss(lambda y: y.square().sum(-1).mean(), damping=1.0))
    x = torch.randn(6, 4)
    chain(x).backward()
    y = chain[0](x).detach().requires_grad_()
    g = 2 * y.detach().double()
    taken = torch.linalg.solve(g.T @ g / 6 + torch.eye(3), g.T).T / 6
    assert torch.allclose(chain[0].weight.grad, (taken.T @ x.double()).float(), atol=1e-6)


def test_state_dict_is_that_of_the_loss() -> None:
    criterion = loss_module()
    gradient(criterion)
    assert list(criterion.state_dict()) == ["loss_fn.weight"]
    assert not npl.NewtonLoss(nn.functional.cross_entropy).state_dict()
    before = {"weight": torch.tensor([3.0, 2.0, 1.0])}
    criterion.load_state_dict({f"loss_fn.{k}": v for k, v in before.items()})
    assert torch.equal(criterion.loss_fn.weight, before["weight"])
    assert not list(criterion.parameters())


def test_repr_says_what_it_does() -> None:
    text = repr(npl.NewtonLoss(nn.functional.cross_entropy, curvature="hessian", damping=0.1))
    assert text == "NewtonLoss(cross_entropy, curvature='hessian', damping=0.1)"
    nested = repr(nn.ModuleDict({"loss": npl.NewtonLoss(nn.MSELoss())}))
    assert "(loss): NewtonLoss(\n    (loss_fn): MSELoss()" in nested
