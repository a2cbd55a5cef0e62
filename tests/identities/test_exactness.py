"""Both doors against the explicit surrogate, with brute-force float64 curvature, to 1e-10."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import pytest
import torch
from tests.cases import CURVATURES, LOSSES, MODULES, STRUCTURES, Case
from tests.twins import gradients_and_hessians, in_one_size, live_samples, relative_error, step
from torch import Tensor

import newton_plugin as npl

DAMPING = 0.05
OPTIONS = [(c, s, p) for c in CURVATURES for s in STRUCTURES for p in (1, 0.5) if c != "norm" or (s, p) == ("mean", 1)]


Batch = tuple[Tensor, Tensor]
Derivatives = list[tuple[Tensor, Tensor]]


@functools.cache
def prepared(make: type[Case]) -> tuple[Case, list[Batch], list[Derivatives]]:
    """A model, four micro-batches, and for each of them g and H of every boundary, by brute force."""
    torch.manual_seed(0)
    model = make().double()
    generator = torch.Generator().manual_seed(1)
    batches = [model.batch(generator) for _ in range(4)]
    derivatives = []
    for x, target in batches:
        output = model(x)

        def loss_of(value: Tensor, which: int, output: Any = output, t: Tensor = target) -> Tensor:
            return model.loss(model.with_boundary(output, which, value), t)

        derivatives.append(
            [gradients_and_hessians(partial(loss_of, which=k), y) for k, y in enumerate(model.boundaries(output))]
        )
    return model, batches, derivatives


def explicit_gradients(
    model: Case, batches: list[Batch], derivatives: list[Derivatives], options: tuple[str, str, float]
) -> Tensor:
    """Parameter gradients of the surrogate written out: forward, targets by the twin, 1/2 ||y - z||^2, backward."""
    model.zero_grad()
    for (x, _), known in zip(batches, derivatives, strict=True):
        output = model(x)
        total = model.plain(output)
        taken = [step(g, h, *options, DAMPING) for g, h in known]
        size = 1.0
        if options[0] == "norm":
            taken, size = in_one_size([g for g, _ in known], taken, 0.5)
        total = size * total
        for y, s in zip(model.boundaries(output), taken, strict=True):
            total = total + npl.quadratic_surrogate(y, y.detach() - s.reshape(y.shape))
        (total / len(batches)).backward()
    return flat_gradient(model)


def flat_gradient(model: Case) -> Tensor:
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([g.flatten() for g in grads])


def hooked_gradients(model: Case, batches: list[Batch], hook: npl.LossHook, scale: float) -> Tensor:
    model.zero_grad()
    for x, target in batches:
        plain = model.loss(model(x), target)
        loss = hook(plain)
        assert loss is plain, "the value of the loss is the user's own, exactly"
        (loss * (scale / len(batches))).backward()
    return flat_gradient(model)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o)))
@pytest.mark.parametrize("make", MODULES, ids=lambda c: c.__name__)
def test_hook_equals_explicit_surrogate(make: type[Case], options: tuple[str, str, float]) -> None:
    model, batches, derivatives = prepared(make)
    curvature, structure, power = options
    damping = "auto" if curvature == "norm" else DAMPING
    hook = npl.LossHook(curvature=curvature, structure=structure, power=power, damping=damping)
    for accumulate in (1, 4):
        theirs = explicit_gradients(model, batches[:accumulate], derivatives[:accumulate], options)
        for scale in (1.0, 65536.0):
            ours = hooked_gradients(model, batches[:accumulate], hook, scale)
            assert relative_error(ours, theirs * scale) <= 1e-10, (accumulate, scale)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o)))
@pytest.mark.parametrize("name", LOSSES)
def test_three_entrances_agree_on_every_loss(name: str, options: tuple[str, str, float]) -> None:
    """newton_step, NewtonLoss (closed forms where there are any) and LossHook against the twin."""
    curvature, structure, power = options
    loss_fn, make = LOSSES[name]
    y, target = make(torch.Generator().manual_seed(3))
    settings = {"curvature": curvature, "structure": structure, "power": power}
    settings["damping"] = "auto" if curvature == "norm" else DAMPING
    g, h = gradients_and_hessians(lambda v: loss_fn(v, target), y)
    live = live_samples(g)
    expected = step(g, h, curvature, structure, power, DAMPING, live).reshape(y.shape)

    taken = npl.newton_step(loss_fn, y, target, **settings)
    assert relative_error(taken.step, expected) <= 1e-10
    assert relative_error(taken.gradient, g.reshape(y.shape)) <= 1e-12
    assert torch.equal(taken.target, y - taken.step)

    for door in (npl.newton_loss(loss_fn, **settings), lambda a, b: npl.LossHook(**settings)(loss_fn(a, b))):
        weight = torch.ones(3, 3, dtype=torch.float64).triu().requires_grad_()
        if y.shape[1] != 3:
            weight = torch.eye(y.shape[1], dtype=torch.float64).requires_grad_()
        raw = torch.linalg.solve(weight.detach().T, y.T).T  # so that raw @ weight is y
        outputs = raw @ weight
        (door(outputs, target) * 8).backward()
        assert relative_error(weight.grad, raw.T @ expected * (8 / live)) <= 1e-9


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_unreduced_and_summed_losses(curvature: str, reduction: str) -> None:
    """A loss for each sample takes the same step as its mean or sum; backward weights reach their own samples."""
    y, target = LOSSES["cross_entropy"][1](torch.Generator().manual_seed(0))
    settings = {"curvature": curvature, "damping": "auto" if curvature == "norm" else DAMPING}

    def summed(v: Tensor, t: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(v, t, reduction="sum")

    def each(v: Tensor, t: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(v, t, reduction="none")

    mean = npl.newton_step(torch.nn.functional.cross_entropy, y, target, **settings).step
    assert relative_error(npl.newton_step(summed, y, target, reduction="sum", **settings).step, mean) <= 1e-12
    assert relative_error(npl.newton_step(each, y, target, reduction=reduction, **settings).step, mean) <= 1e-12
    outputs = y.clone().requires_grad_()
    weights = torch.arange(1.0, len(y) + 1, dtype=torch.float64)
    wrapped = npl.newton_loss(each, reduction=reduction, **settings)
    (wrapped(outputs, target) * weights).sum().backward()
    assert relative_error(outputs.grad, mean * weights[:, None]) <= 1e-12


@pytest.mark.parametrize("feature_dims", [1, -1, (1, 2), (2, 1)])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_feature_dims_are_a_permutation_of_rows(curvature: str, feature_dims: int | tuple[int, ...]) -> None:
    """Steps on (N, A, B) equal steps on the rows laid out by hand."""
    y = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settings = {"curvature": curvature, "damping": "auto" if curvature == "norm" else DAMPING}

    def rows_of(v: Tensor) -> Tensor:
        dims = {1: (0, 2, 1), -1: (0, 1, 2)}.get(feature_dims) if isinstance(feature_dims, int) else (0, 1, 2)
        last = 1 if isinstance(feature_dims, int) else 2
        moved = v.permute(*dims)
        return moved.reshape(-1, v.permute(*dims).shape[-last:].numel())

    def loss(v: Tensor) -> Tensor:
        r = rows_of(v)
        return (torch.sin(r.cumsum(-1)).square().sum(-1) + r.prod(-1)).mean()

    def row_loss(r: Tensor) -> Tensor:
        return (torch.sin(r.cumsum(-1)).square().sum(-1) + r.prod(-1)).mean()

    whole = npl.newton_step(loss, y, feature_dims=feature_dims, **settings).step
    by_hand = npl.newton_step(row_loss, rows_of(y), **settings).step
    assert relative_error(rows_of(whole), by_hand) <= 1e-12


def test_large_fisher_goes_through_n_by_n() -> None:
    """Above 1,024 features C is never formed; the step is the dense one."""
    g = torch.Generator().manual_seed(0)
    y = torch.randn(5, 1500, generator=g, dtype=torch.float64)

    def loss(v: Tensor) -> Tensor:
        return torch.log1p(v.square()).sum(-1).mean()

    gradient = npl.newton_step(loss, y, damping=1.0).gradient
    c = gradient.T @ gradient / 5
    for power in (1, 0.5):
        ours = npl.newton_step(loss, y, damping=0.7, power=power)
        values, vectors = torch.linalg.eigh(c)
        theirs = gradient @ vectors @ torch.diag((values + 0.7) ** -power) @ vectors.T
        assert ours.curvature is None
        assert relative_error(ours.step, theirs) <= 1e-10
