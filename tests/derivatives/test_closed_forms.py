"""Hessians read off the graph: equal to the dense twin where one is found, none where there is none."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests import twins
from tests.twins import gradients_and_hessians, live_samples, relative_error
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

import newton_plugin as npl
from newton_plugin._boundary.autograd_graph import explore, make_boundary
from newton_plugin._boundary.rows import RowLayout
from newton_plugin._derivatives.closed_forms import find_closed_form

G = torch.Generator().manual_seed(0)
Y = torch.randn(7, 4, generator=G, dtype=torch.float64)
HARD = torch.tensor([0, 1, 2, 3, 0, -100, 2])
SOFT = torch.softmax(torch.randn(7, 4, generator=G, dtype=torch.float64), -1)
REAL = torch.rand(7, 4, generator=G, dtype=torch.float64)
W = torch.tensor([1.0, 0.2, 3.0, 0.5], dtype=torch.float64)

Loss = Callable[[Tensor], Tensor]


def losses() -> dict[str, Loss]:
    """Losses of Y whose Hessian the package finds."""
    rows: list[tuple[Any, Tensor, dict[str, Any]]] = [
        (F.mse_loss, REAL, {}),
        (F.mse_loss, REAL, {"reduction": "sum"}),
        (nn.MSELoss(), REAL, {}),
        (F.cross_entropy, HARD, {}),
        (F.cross_entropy, HARD, {"weight": W}),
        (F.cross_entropy, HARD, {"weight": W, "label_smoothing": 0.3}),
        (F.cross_entropy, HARD, {"weight": W, "label_smoothing": 0.3, "reduction": "sum"}),
        (F.cross_entropy, HARD.clamp_min(0), {"ignore_index": 2, "label_smoothing": 0.1}),
        (F.cross_entropy, SOFT, {}),
        (F.cross_entropy, SOFT, {"weight": W, "label_smoothing": 0.3}),
        (F.cross_entropy, SOFT, {"weight": W, "reduction": "sum"}),
        (nn.CrossEntropyLoss(weight=W, label_smoothing=0.2, ignore_index=1), HARD.clamp_min(0), {}),
        (F.binary_cross_entropy_with_logits, REAL, {}),
        (F.binary_cross_entropy_with_logits, REAL, {"weight": W, "pos_weight": W.flip(0)}),
        (F.binary_cross_entropy_with_logits, REAL, {"pos_weight": W, "reduction": "sum"}),
        (nn.BCEWithLogitsLoss(pos_weight=W, reduction="sum"), REAL, {}),
    ]
    found: dict[str, Loss] = {
        f"{k} {getattr(fn, '__name__', fn)} {sorted(kw)}": lambda y, fn=fn, t=t, kw=kw: fn(y, t, **kw)
        for k, (fn, t, kw) in enumerate(rows)
    }
    found["times a constant, plus what is linear"] = lambda y: 0.3 * F.cross_entropy(y, HARD) + y.mean() / 7 - 1
    found["the user's own cross-entropy"] = lambda y: -(SOFT * torch.log_softmax(y, -1)).sum(1).mean()
    found["a subclass"] = lambda y: type("Sub", (nn.MSELoss,), {})()(y, REAL)
    found["elements weighted afterwards"] = lambda y: (F.mse_loss(y, REAL, reduction="none") * W).mean()
    found["samples weighted afterwards"] = lambda y: (
        F.cross_entropy(y, HARD, reduction="none") * torch.arange(7.0, dtype=torch.float64)
    ).mean()
    return found


def outputs() -> Tensor:
    """Y as a layer's output that keeps its gradient: an identity matrix applied to it."""
    layer = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
    y = layer(Y)
    y.retain_grad()
    return y


def form_of(loss_of: Loss, y: Tensor, feature_dims: tuple[int, ...] | None = None) -> Any:
    y = y.detach().requires_grad_().clone()
    edge = get_gradient_edge(y)
    loss = loss_of(y)
    at = (edge.node, edge.output_nr)
    assert loss.grad_fn is not None
    boundary = make_boundary("y", at, explore(loss.grad_fn, at.__eq__))
    return find_closed_form(loss.grad_fn, boundary, RowLayout(tuple(y.shape), feature_dims))


@pytest.mark.filterwarnings("ignore:.*but it was computed with reduction:UserWarning")  # both, on purpose
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", losses())
def test_closed_forms_are_found_and_exact(name: str, reduction: str) -> None:
    loss_of = losses()[name]
    assert form_of(loss_of, Y) is not None
    g, h = gradients_and_hessians(loss_of, Y, mean=reduction == "mean")
    for structure in ("mean", "per_sample", "isotropic"):
        options: dict[str, Any] = {"curvature": "hessian", "structure": structure, "damping": 0.1}
        theirs = twins.step(g, h, "hessian", structure, 1, 0.1, live_samples(g))
        assert relative_error(npl.newton_step(loss_of, Y, reduction=reduction, **options).step, theirs) <= 1e-10
        for door in (npl.newton_loss(loss_of, reduction=reduction, **options), None):
            y = outputs()
            loss = npl.LossHook(reduction=reduction, **options)(loss_of(y)) if door is None else door(y)
            (8.0 * loss).backward()
            assert y.grad is not None
            expected = 8.0 * theirs / (live_samples(g) if reduction == "mean" else 1)
            assert relative_error(y.grad, expected) <= 1e-10


@pytest.mark.parametrize("fn", [F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits])
def test_one_loss_for_each_sample(fn: Any) -> None:
    target = HARD if fn is F.cross_entropy else REAL
    weights = torch.tensor([0.0, 1, 2, 0, 0.5, 3, 1], dtype=torch.float64)

    def unreduced(y: Tensor) -> Tensor:
        value = fn(y, target, reduction="none")
        return value if value.ndim == 1 else value.sum(-1)

    g, h = gradients_and_hessians(lambda y: unreduced(y).sum(), Y, mean=False)
    leaf = Y.clone().requires_grad_()
    (weights * npl.newton_loss(unreduced, curvature="hessian", damping=0.1)(leaf * 1.0)).sum().backward()
    expected = weights.unsqueeze(1) * twins.step(g, h, "hessian", "mean", 1, 0.1, live_samples(g))
    assert leaf.grad is not None
    assert relative_error(leaf.grad, expected) <= 1e-10


def test_dense_prediction_by_feature_dims() -> None:
    y = torch.randn(2, 4, 3, 3, generator=G, dtype=torch.float64)
    t = torch.randint(4, (2, 3, 3), generator=G)
    assert form_of(lambda v: F.cross_entropy(v, t), y, (1,)) is not None
    assert form_of(lambda v: F.cross_entropy(v, t), y) is None, "a row of all pixels has a block for each"
    rows = y.permute(0, 2, 3, 1).reshape(-1, 4)
    ours = npl.newton_step(F.cross_entropy, y, t, curvature="hessian", damping=0.1, feature_dims=1).step
    theirs = npl.newton_step(F.cross_entropy, rows, t.reshape(-1), curvature="hessian", damping=0.1).step
    assert relative_error(ours.permute(0, 2, 3, 1).reshape(-1, 4), theirs) <= 1e-12


class Add(torch.autograd.Function):
    """Not torch's addition, in spite of its name."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


NONE: dict[str, Loss] = {
    "broadcast": lambda y: F.mse_loss(y, REAL[:, :1].expand(-1, 4) * y.detach()[:, :1].mean(), reduction="mean").sqrt(),
    "not linear after it": lambda y: F.cross_entropy(y, HARD.clamp_min(0)).square(),
    "a function of the user's after it": lambda y: Add.apply(F.cross_entropy(y, HARD)),
    "a second way to the outputs": lambda y: F.cross_entropy(y, HARD) + 0.1 * y.square().mean(),
    "the outputs on both sides": lambda y: F.mse_loss(y, y.flip(0)),
    "softmax over the samples": lambda y: -(SOFT * torch.log_softmax(y, 0)).sum() / 7,
    "divided by the outputs": lambda y: F.mse_loss(y, REAL) / (1 + y.square().sum()),
    "no known operation": lambda y: F.huber_loss(y, REAL),
    "something before it": lambda y: F.cross_entropy(2 * y, HARD),
}


@pytest.mark.parametrize("name", NONE)
def test_what_has_no_closed_form_takes_the_generic_path(name: str) -> None:
    loss_of = NONE[name]
    assert form_of(loss_of, Y) is None
    if name not in ("a second way to the outputs", "no known operation", "something before it"):
        return  # the others couple the samples: no per-sample Hessian to compare with
    g, h = gradients_and_hessians(loss_of, Y)
    ours = npl.newton_step(loss_of, Y, curvature="hessian", damping=0.1).step
    assert relative_error(ours, twins.step(g, h, "hessian", "mean", 1, 0.1, live_samples(g))) <= 1e-10


def quartic(y: Tensor, hold: list[int] | None = None) -> Tensor:
    """A mean over samples whose Hessian is said, and not differentiated: the power of the norm counts the calls."""
    at = y.detach()

    def blocks() -> Tensor:
        if hold is not None:
            hold.append(1)
        eye = torch.eye(at.shape[1], dtype=at.dtype)
        squared = at.square().sum(-1)
        return (4 * squared[:, None, None] * eye + 8 * at.unsqueeze(-1) * at.unsqueeze(-2)) / len(at)

    return npl.with_hessian(y.square().sum(-1).square().mean(), y, blocks)


@pytest.mark.parametrize("structure", ["mean", "per_sample", "isotropic"])
@pytest.mark.parametrize("around", [lambda v: v, lambda v: 3 * v + 1, lambda v: v / 2])
def test_a_loss_that_brings_its_hessian(structure: Any, around: Loss) -> None:
    hold: list[int] = []
    g, h = gradients_and_hessians(lambda y: around(quartic(y)), Y)
    options: dict[str, Any] = {"curvature": "hessian", "structure": structure, "damping": 0.1}
    theirs = twins.step(g, h, "hessian", structure, 1, 0.1) / len(Y)
    for door in ("hook", "wrapper"):
        y = outputs()
        if door == "hook":
            loss = npl.LossHook(**options)(around(quartic(y, hold)))
        else:
            loss = npl.newton_loss(lambda v: around(quartic(v, hold)), **options)(y)
        assert not hold, "not before the backward pass"
        loss.backward()
        assert len(hold) == 1
        assert y.grad is not None
        assert relative_error(y.grad, theirs) <= 1e-10
        hold.clear()


def test_with_hessian_in_evaluation_and_with_fisher_is_never_asked() -> None:
    hold: list[int] = []
    with torch.no_grad():
        quartic(Y, hold)
    quartic(Y, hold)
    npl.LossHook()(quartic(Y.clone().requires_grad_() * 1.0, hold)).backward()
    assert not hold


def test_with_hessian_is_not_used_where_more_than_it_depends_on_the_outputs() -> None:
    hold: list[int] = []

    def more(y: Tensor) -> Tensor:
        return quartic(y, hold) + (y**4).sum(-1).mean()

    g, h = gradients_and_hessians(more, Y)
    ours = npl.newton_step(more, Y, curvature="hessian", damping=0.1).step
    assert not hold
    assert relative_error(ours, twins.step(g, h, "hessian", "mean", 1, 0.1)) <= 1e-10


def test_with_hessian_says_what_is_wrong() -> None:
    y = Y.clone().requires_grad_()
    with pytest.raises(npl.ShapeError, match=r"one for each sample \(N,\) of outputs \(N, ...\); got shapes \(3,\)"):
        npl.with_hessian(y.sum(0)[:3], y, lambda: Y)
    with pytest.raises(npl.ArgumentTypeError, match="blocks must be a function without arguments; got Tensor"):
        npl.with_hessian(y.sum(), y, Y)  # type: ignore[arg-type]
    with pytest.raises(npl.ArgumentTypeError, match=r"loss must be a torch\.Tensor; got float"):
        npl.with_hessian(1.0, y, lambda: Y)  # type: ignore[arg-type]
    with pytest.raises(npl.NoGradientError, match="was it detached"):
        npl.with_hessian(y.sum().detach(), y, lambda: Y)
    z = outputs()
    loss = npl.LossHook(curvature="hessian")(npl.with_hessian(z.square().sum(), z, lambda: Y))
    with pytest.raises(npl.ShapeError, match=r"blocks must give \(N, m, m\) = \(7, 4, 4\)"):
        loss.backward()


@pytest.mark.parametrize("loss_of", [lambda y: F.cross_entropy(y, HARD), quartic])
def test_nothing_is_kept_alive(loss_of: Loss) -> None:
    """Neither the closed forms nor what with_hessian notes hold on to the graph, without the garbage collector."""
    gc.disable()
    try:
        y = outputs()
        inner = y * torch.ones(4, dtype=torch.float64).requires_grad_()  # its product saves y
        watched = weakref.ref(y)
        loss = npl.LossHook(curvature="hessian", damping=0.1)(loss_of(inner))
        del y, inner, loss
        assert watched() is None
    finally:
        gc.enable()
