"""The door for a loss function: functions, modules, methods, keyword arguments, other differentiable inputs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.twins import gradients_and_hessians, relative_error, step
from torch import Tensor, nn

import newton_plugin as npl

Y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor([0, 1, 2, 0, 1])


def expected(loss_fn: object, y: Tensor = Y, damping: float = 0.1) -> Tensor:
    g, h = gradients_and_hessians(loss_fn, y)  # type: ignore[arg-type]
    return step(g, h, "fisher", "mean", 1, damping) / len(y)


def grad_of(call: object) -> Tensor:
    y = Y.clone().requires_grad_()
    call(y).backward()  # type: ignore[operator]
    assert y.grad is not None
    return y.grad


def test_decorated_function_with_and_without_options() -> None:
    @npl.newton_loss
    def bare(outputs: Tensor, target: Tensor) -> Tensor:
        """A docstring."""
        return F.cross_entropy(outputs, target)

    @npl.newton_loss(damping=0.1)
    def tuned(outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target)

    assert bare.__name__ == "bare"
    assert bare.__doc__ == "A docstring."
    assert repr(tuned) == "NewtonLoss(tuned, damping=0.1)"
    assert torch.equal(bare(Y.clone().requires_grad_(), T), F.cross_entropy(Y, T))
    assert relative_error(grad_of(lambda y: tuned(y, T)), expected(lambda v: F.cross_entropy(v, T))) <= 1e-12


@pytest.mark.parametrize("outputs", [1, "scores"])
def test_outputs_that_are_not_first(outputs: int | str) -> None:
    @npl.newton_loss(damping=0.1, outputs=outputs)
    def loss(target: Tensor, scores: Tensor, *, weight: float = 1.0) -> Tensor:
        return weight * F.cross_entropy(scores, target)

    for call in (lambda y: loss(T, y, weight=2.0), lambda y: loss(T, scores=y, weight=2.0)):
        assert relative_error(grad_of(call), expected(lambda v: 2 * F.cross_entropy(v, T))) <= 1e-12


def test_a_method_has_a_state_for_each_object_and_leaves_nothing_on_it() -> None:
    class Model(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        @npl.newton_loss(curvature="fisher")
        def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
            return self.scale * F.cross_entropy(outputs, target)

    small, large = Model(1.0), Model(100.0)
    others = [Model(1.0), Model(100.0)]
    alone = [grad_of(lambda y, m=other: m.loss(y, T)) for other in others]
    for _ in range(3):
        assert relative_error(grad_of(lambda y: small.loss(y, T)), alone[0]) <= 1e-12
        assert relative_error(grad_of(lambda y: large.loss(y, T)), alone[1]) <= 1e-12
    assert set(vars(small)) == set(vars(Model(1.0)))
    copy.deepcopy(small).loss(Y.clone().requires_grad_(), T)
    small.eval()
    plain = torch.autograd.grad(F.cross_entropy(y := Y.clone().requires_grad_(), T), y)[0]
    assert torch.equal(grad_of(lambda y: small.loss(y, T)), plain), "eval() is the plain loss, for a method too"


def test_a_module_is_wrapped_with_its_parameters_and_device_moves() -> None:
    loss = npl.newton_loss(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])), damping=0.1).double()
    assert "CrossEntropyLoss" in repr(loss)
    weight = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    theirs = expected(lambda v: F.cross_entropy(v, T, weight=weight))
    assert relative_error(grad_of(lambda y: loss(y, T)), theirs) <= 1e-12
    assert set(loss.state_dict()) == {"loss_fn.weight"}, "no running state in checkpoints"


def test_other_differentiable_arguments_keep_their_gradients() -> None:
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    soft = torch.softmax(Y.flip(0), -1).requires_grad_()

    def fn(y: Tensor, t: Tensor, tau: Tensor) -> Tensor:
        return F.cross_entropy(y / tau, t)

    y = Y.clone().requires_grad_()
    npl.newton_loss(fn, damping=0.1)(y, soft, temperature).backward()
    plain = torch.autograd.grad(fn(Y, soft, temperature), [soft, temperature])
    assert torch.equal(soft.grad, plain[0])
    assert torch.equal(temperature.grad, plain[1])


def test_several_outputs() -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        return (a.square().sum(-1) * 2 + torch.cosh(b).sum(-1)).mean()

    a, b = Y.clone().requires_grad_(), (Y + 1).requires_grad_()
    npl.newton_loss(fn, damping=0.1, outputs=[0, "b"])(a, b=b).backward()
    assert relative_error(a.grad, expected(lambda v: fn(v, b.detach()))) <= 1e-12
    assert relative_error(b.grad, expected(lambda v: fn(a.detach(), v), b.detach())) <= 1e-12


def test_wrapping_a_wrapped_loss_steps_once() -> None:
    once = npl.newton_loss(F.cross_entropy, damping=0.1)
    twice = npl.newton_loss(once, damping=0.1)
    assert relative_error(grad_of(lambda y: twice(y, T)), grad_of(lambda y: once(y, T))) <= 1e-14


def test_a_copy_has_a_state_of_its_own() -> None:
    loss = npl.newton_loss(F.cross_entropy)
    grad_of(lambda y: loss(y, T))
    other = copy.deepcopy(loss)
    grad_of(lambda y: other(100 * y, T))
    fresh = npl.newton_loss(F.cross_entropy)
    grad_of(lambda y: fresh(y, T))
    assert torch.equal(grad_of(lambda y: loss(y, T)), grad_of(lambda y: fresh(y, T)))


@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
def test_value_gradient_and_hessian_come_from_one_evaluation(curvature: str) -> None:
    """A loss that samples: the step belongs to the same sample as the value."""
    calls = []

    def noisy(y: Tensor, t: Tensor) -> Tensor:
        calls.append(torch.randn(y.shape, dtype=y.dtype))
        return torch.cosh(y + calls[-1] - t).sum(-1).mean()

    torch.manual_seed(0)
    target = torch.zeros_like(Y)
    ours = grad_of(lambda y: npl.newton_loss(noisy, curvature=curvature, damping=0.1)(y, target))
    assert len(calls) == 1
    g, h = gradients_and_hessians(lambda v: torch.cosh(v + calls[0] - target).sum(-1).mean(), Y)
    assert relative_error(ours, step(g, h, curvature, "mean", 1, 0.1) / len(Y)) <= 1e-12
