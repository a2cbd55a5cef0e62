"""boundary="head": outputs named by the submodule that returns them, or by the loss that is called with them."""

from __future__ import annotations

import copy
import pickle
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tests.twins import gradients_and_hessians, relative_error, step
from torch import Tensor, nn

import newton_plugin as npl

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0, 1, 2, 0, 1, 2])


class Output(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Output:
        hidden = self.trunk(x).tanh()
        return Output(self.head(hidden), hidden)

    def method(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.criterion(logits, target)

    def functional(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target)


def expected_gradient(model: Model, damping: float = 0.1) -> Tensor:
    y = model(X.double()).logits
    g, h = gradients_and_hessians(lambda v: F.cross_entropy(v, T), y)
    taken = step(g, h, "fisher", "mean", 1, damping)
    grads = torch.autograd.grad(y, list(model.parameters()), taken / len(X), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def gradient(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("boundary", ["auto", "head", "criterion", "method", "cross_entropy", ["head"]])
def test_named_boundaries_agree_with_auto(boundary: Any) -> None:
    torch.manual_seed(0)
    model = Model().double()
    hook = npl.LossHook(damping=0.1, boundary=boundary, module=model)
    before = set(vars(model))
    with hook.watch():
        loss = model.method(model(X.double()).logits, T)
    hook(loss).backward()
    assert relative_error(gradient(model), expected_gradient(model)) <= 1e-12
    hook.detach()
    assert set(vars(model)) == before
    assert not model.head._forward_hooks
    assert not model.criterion._forward_pre_hooks


def test_a_whole_submodules_tuple_output() -> None:
    """boundary="" is refused; the root's own outputs are found by graph, a submodule's tuple is recorded whole."""
    wrapper = nn.ModuleDict({"model": Model()})
    hook = npl.LossHook(boundary="model", module=wrapper, damping=0.1)
    out = wrapper["model"](X)
    with pytest.warns(UserWarning, match="nearer the loss"):
        hook(F.cross_entropy(out.logits, T) + out.hidden.square().mean()).backward()
    assert hook.diagnostics()["fallbacks"] == 0


def test_copies_of_a_hooked_module_are_plain() -> None:
    model = Model()
    hook = npl.LossHook(boundary="head", module=model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        clone(X).logits.sum().backward()
        with pytest.raises(npl.NoBoundaryError, match="nothing recorded"):
            hook(clone(X).logits.square().mean())
    hook.detach()


def test_a_recording_does_not_outlive_its_forward_pass() -> None:
    model = Model()
    hook = npl.LossHook(boundary="head", module=model, damping=0.1)
    for _ in range(300):
        model(X)  # losses that never come
    assert len(hook._search.finders[0]._recorder.recorded) <= 256
    with torch.no_grad():
        model(X)
    with hook.watch():
        assert not hook._search.finders[0]._recorder.recorded
        loss = F.cross_entropy(model(X).logits, T)
    hook(loss)
