"""Outputs that have no rows of real numbers: complex and nested ones, and a loss without outputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import newton_plugin as npl

G = torch.Generator().manual_seed(0)
X = torch.randn(6, 5, generator=G, dtype=torch.float64)
nested = pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")


def complex_outputs() -> tuple[nn.Linear, Tensor]:
    net = nn.Linear(5, 3, dtype=torch.complex128)
    return net, net(X.to(torch.complex128))


@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
def test_complex_outputs_are_refused_by_every_door(curvature: str) -> None:
    _, y = complex_outputs()
    words = r"floating-point dtype; got torch\.complex128.*torch\.view_as_real\(outputs\)"
    with pytest.raises(npl.ArgumentTypeError, match=words):
        npl.LossHook(curvature=curvature)(y.abs().square().mean())  # type: ignore[arg-type]
    with pytest.raises(npl.ArgumentTypeError, match=words):
        npl.newton_step(lambda y: y.abs().square().mean(), y, curvature=curvature)  # type: ignore[arg-type]
    with pytest.raises(npl.ArgumentTypeError, match=r"floating-point dtype; got torch\.complex128"):
        npl.newton_loss(lambda y: y.abs().square().mean(), curvature=curvature)(y)  # type: ignore[arg-type]


def test_view_as_real_is_what_the_message_promises() -> None:
    net, y = complex_outputs()
    target = torch.randn(6, 3, 2, generator=G, dtype=torch.float64)

    def loss(r: Tensor) -> Tensor:
        return (r - target).square().sum((-1, -2)).mean()

    real = torch.view_as_real(y)
    (got,) = torch.autograd.grad(npl.LossHook(damping=0.1)(loss(real)), net.weight, retain_graph=True)
    step = npl.newton_step(loss, real.detach(), damping=0.1).step
    (wanted,) = torch.autograd.grad(real, net.weight, step / 6)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


@nested
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors_are_refused_by_name(layout: torch.layout) -> None:
    net = nn.Linear(5, 3).double()
    y = net(torch.nested.nested_tensor([X[:2], X[2:]], layout=layout))
    loss = (torch.nested.to_padded_tensor(y, 0.0) if layout is torch.strided else y.values()).square().mean()
    with pytest.raises(npl.ArgumentTypeError, match=r"computed from a nested tensor.*to_padded_tensor"):
        npl.LossHook()(loss)
    with pytest.raises(npl.ArgumentTypeError, match="outputs must not be a nested tensor"):
        npl.newton_step(lambda y: y.values().mean(), y.detach())


def test_a_loss_that_stands_for_an_empty_batch_is_counted() -> None:
    net, hook = nn.Linear(5, 3).double(), npl.LossHook()
    empty = torch.zeros((), requires_grad=True)
    with pytest.raises(npl.NoGradientError, match="no autograd graph"):  # at first it is more likely a mistake
        hook(empty)
    hook(F.mse_loss(net(X), X[:, :3])).backward()
    assert hook(empty) is empty
    assert hook.diagnostics()["fallbacks"] == 1
    hook(F.mse_loss(net(X), X[:, :3])).backward()
    assert hook.diagnostics()["fallbacks"] == 1
    with pytest.raises(npl.NoGradientError, match="no autograd graph"):  # never right: nothing requires grad
        hook(torch.zeros(()))


@pytest.mark.parametrize(
    "loss", [F.mse_loss, F.huber_loss, F.binary_cross_entropy_with_logits], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("told", ["mean", "sum"])
@pytest.mark.parametrize("computed", ["mean", "sum"])
def test_a_reduction_that_was_not_told_is_noticed(loss: object, told: str, computed: str) -> None:
    """A sum that is taken for a mean: gradients N times too long, and steps shorter or longer by that."""
    net, hook = nn.Linear(5, 3).double(), npl.LossHook(reduction=told)  # type: ignore[arg-type]

    def train() -> None:
        hook(loss(net(X), torch.zeros(6, 3).double(), reduction=computed)).backward()  # type: ignore[operator]

    if told == computed:
        train()  # warnings are errors
    else:
        with pytest.warns(UserWarning, match=f"computed with reduction='{computed}'.*: reduction='{computed}'"):
            train()
        train()  # once


def test_a_cause_is_told_once_whatever_the_shapes() -> None:
    """The same tensor left out of batches of many sizes is one cause."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = self.first(x)
            return hidden, self.second(torch.tanh(hidden))

    net = nn.ModuleDict({"both": Both()})
    hook = npl.LossHook(boundary="both", module=net)

    def train() -> None:
        for n in (6, 5, 4, 3):
            hidden, y = net["both"](X[:n])
            hook(y.square().mean() + 0.1 * hidden.square().mean()).backward()

    with pytest.warns(UserWarning, match="leaves one boundary out") as caught:
        train()
    assert len(caught) == 1
