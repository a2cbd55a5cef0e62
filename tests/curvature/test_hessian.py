"""Indefinite repair, and what happens where there is no Hessian."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.twins import power_solve, relative_error
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import newton_plugin as npl
from newton_plugin._linalg.damped_inverse import repaired_inverse

G = torch.Generator().manual_seed(0)
Y = torch.randn(7, 4, generator=G, dtype=torch.float64)
HARD = torch.tensor([0, 1, 2, 3, 0, -100, 2])
REAL = torch.rand(7, 4, generator=G, dtype=torch.float64)
W = torch.tensor([1.0, 0.2, 3.0, 0.5], dtype=torch.float64)


def test_repair_of_indefinite_matrices_only_where_needed() -> None:
    """A batch of definite, indefinite and negative matrices: each against its own dense solve."""
    q = torch.linalg.qr(torch.randn(5, 3, 3, generator=G, dtype=torch.float64)).Q
    values = torch.tensor([[1.0, 2, 3], [-1, 0.5, 2], [-3, -2, -1], [0, 0, 0], [-0.05, 1, 1]], dtype=torch.float64)
    c = q @ torch.diag_embed(values) @ q.mT
    g = torch.randn(5, 3, generator=G, dtype=torch.float64)
    d = torch.tensor(0.1, dtype=torch.float64)
    theirs = torch.stack([power_solve(c[i], 0.1, g[i], 1) for i in range(5)])
    assert relative_error(repaired_inverse(c, d)(g), theirs) <= 1e-12
    for i in range(5):
        assert relative_error(repaired_inverse(c[i], d)(g[i : i + 1]), theirs[i : i + 1]) <= 1e-12
    per_sample = d.expand(5) * torch.arange(1, 6)
    theirs = torch.stack([power_solve(c[i], float(per_sample[i]), g[i], 1) for i in range(5)])
    assert relative_error(repaired_inverse(c, per_sample)(g), theirs) <= 1e-12


class OnlyOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Passed(torch.autograd.Function):
    """The identity, whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class NoBatchingRule(torch.autograd.Function):
    """Twice differentiable, through numpy-like host code that vmap cannot follow."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if float(grad.detach().sum()) == 12345.0:
            raise AssertionError
        return 3 * x**2 * grad


NO_HESSIAN = [
    (lambda y: y.abs().sum(-1).mean(), "the Hessian is zero at these outputs"),
    (lambda y: OnlyOnce.apply(y).sum(-1).mean(), "differentiable only once"),
    (lambda y: (torch.relu(y) * 2).sum(-1).mean(), "zero"),
    (lambda y: F.multi_margin_loss(y, HARD.clamp_min(0), p=2), "multi_margin_loss_backward is not implemented"),
    (lambda y: torch.cdist(y.unsqueeze(1), REAL.unsqueeze(1)).square().mean(), "_cdist_backward' is not implemented"),
    (lambda y: torch.where(y > 0, y, 0.5 * y).sum(-1).mean(), "does not depend|zero"),
]


@pytest.mark.parametrize(("loss_fn", "cause"), NO_HESSIAN)
@pytest.mark.parametrize("structure", ["mean", "per_sample", "isotropic"])
def test_no_hessian_falls_back_to_fisher_once_warned(loss_fn: Any, cause: str, structure: str) -> None:
    fisher = npl.newton_step(loss_fn, Y, structure=structure, damping=0.1)
    with pytest.warns(UserWarning, match=f"empirical Fisher in place of Hessian.*({cause})"):
        ours = npl.newton_step(loss_fn, Y, curvature="hessian", structure=structure, damping=0.1)
    assert relative_error(ours.step, fisher.step) <= 1e-12

    hook = npl.LossHook(curvature="hessian", structure=structure, damping=0.1)
    head = nn.Linear(4, 4).double()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            hook(loss_fn(head(Y))).backward()
    assert len(caught) == 1, "one warning, not one a step"
    assert hook.diagnostics()["fallbacks"] == 3


def test_operations_without_a_batching_rule_take_one_probe_at_a_time() -> None:
    def loss(y: Tensor) -> Tensor:
        return NoBatchingRule.apply(y).sum(-1).mean()

    ours = npl.newton_step(loss, Y, curvature="hessian", structure="per_sample", damping=0.1)
    assert relative_error(ours.curvature, torch.diag_embed(6 * Y)) <= 1e-12


def branch(y: Tensor) -> Tensor:
    scale = 2.0 if float(y.detach().sum()) > 0 else 1.0
    z = y.clone()
    z[0] = z[0] * 2
    return scale * torch.cosh(z).sum(-1).mean()


@pytest.mark.parametrize(
    "loss_fn",
    [
        branch,
        lambda y: F.huber_loss(y, REAL),
        lambda y: F.soft_margin_loss(y, REAL.sign()),
    ],
    ids=["in-place, branch and item", "huber", "soft margin"],
)
def test_losses_that_torch_func_cannot_follow(loss_fn: Any) -> None:
    """Plain double backward on the live graph: no vmap traceback, the right Hessian."""
    ours = npl.newton_step(loss_fn, Y, curvature="hessian", structure="per_sample", damping=0.1)
    full = torch.autograd.functional.hessian(loss_fn, Y).reshape(7, 4, 7, 4)
    blocks = torch.stack([full[i, :, i] for i in range(7)]) * 7
    assert relative_error(ours.curvature, blocks) <= 1e-10


def info_nce(y: Tensor) -> Tensor:
    return F.cross_entropy(y @ y.T, torch.arange(len(y)))


def test_coupled_losses() -> None:
    """Refused where a Hessian is asked for."""
    with pytest.raises(npl.BatchCoupledError, match=r"couples the samples.*Use curvature='fisher' or 'norm'\."):
        npl.newton_step(info_nce, Y, curvature="hessian")
    with pytest.raises(npl.BatchCoupledError, match="couples the samples"):
        npl.LossHook(curvature="hessian")(info_nce(nn.Linear(4, 4).double()(Y)))


def test_class_weights_and_ignored_samples_by_whole_batch_probes() -> None:
    """An ignored sample has a zero Hessian, and the weights' normalisation is the batch's."""
    taken = npl.newton_step(
        lambda y: F.cross_entropy(y, HARD, weight=W), Y, curvature="hessian", structure="per_sample", damping=0.1
    )
    assert bool((taken.curvature[5] == 0).all())
    p = torch.softmax(Y[0], -1)
    carried = 6 * W[0] / W[HARD[HARD >= 0]].sum()
    assert relative_error(taken.curvature[0], carried * (torch.diag(p) - torch.outer(p, p))) <= 1e-12


def test_a_part_that_is_differentiable_once_is_not_silently_left_out() -> None:
    """Autograd gives the Hessian of the rest, 0.2 I, and no error; the true one is 2.2 I."""
    y = torch.randn(5, 3, dtype=torch.float64)

    def loss(y: Tensor) -> Tensor:
        return (Passed.apply(y).square() + 0.1 * y.square()).sum(-1).mean()

    with pytest.warns(UserWarning, match="Fisher in place of Hessian.*differentiable only once"):
        taken = npl.newton_step(loss, y, curvature="hessian", damping=0.1)
    assert torch.equal(taken.step, npl.newton_step(loss, y, curvature="fisher", damping=0.1).step)


@pytest.mark.parametrize("structure", ["mean", "per_sample", "isotropic"])
@pytest.mark.parametrize("damping", ["auto", 0.1])
def test_a_hessian_that_is_not_finite_leaves_the_gradient_as_it_is(structure: Any, damping: Any) -> None:
    """|y|^1.5 at 0: the gradient is 0, the second derivative infinite. And the running mean goes on without it."""
    hook = npl.LossHook(curvature="hessian", structure=structure, damping=damping)

    def sent(values: list[float]) -> Tensor:
        y = torch.tensor([values], dtype=torch.float64, requires_grad=True)
        hook((y * 1).abs().pow(1.5).sum(-1).mean()).backward()
        assert y.grad is not None
        return y.grad

    assert relative_error(sent([0.0, 1.0]), torch.tensor([[0.0, 1.5]])) == 0
    assert hook.diagnostics()["fallbacks"] == 1
    assert sent([4.0, 1.0]).isfinite().all()
    assert relative_error(sent([0.0, 1.0]), torch.tensor([[0.0, 1.5]])) == 0
    assert hook.diagnostics()["fallbacks"] == 2
    y = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    with pytest.raises(npl.NonFiniteError, match=r"curvature C of this batch is not finite|not finite"):
        npl.newton_step(lambda v: v.abs().pow(1.5).sum(-1).mean(), y, curvature="hessian", structure=structure)


def test_a_loss_may_work_in_place_on_its_outputs() -> None:
    y, t = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    before = y.clone()
    for curvature in ("fisher", "hessian"):
        ours = npl.newton_step(lambda v: v.mul_(2).sub_(t).square().sum(-1).mean(), y, curvature=curvature, damping=0.1)
        theirs = npl.newton_step(lambda v: (2 * v - t).square().sum(-1).mean(), y, curvature=curvature, damping=0.1)
        assert torch.equal(ours.step, theirs.step)
    assert torch.equal(y, before)
