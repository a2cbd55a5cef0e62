"""The pure engine on a device: an ensemble equals its members, and a captured step gives its state back as a result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.cuda.device import DEVICE, cuda_alone, error
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_leaves, tree_map

import newton_plugin as npl

OPTIONS: list[dict[str, Any]] = [{}, {"curvature": "norm"}, {"structure": "mean"}, {"curvature": "hessian"}]


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Weights of three members, (3, 4, 5), batches x (2, 16, 5) and classes (2, 16)."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 16, 5, generator=generator, dtype=torch.float64)
    classes = torch.randint(0, 4, (2, 16), generator=generator)
    return weights.to(DEVICE), x.to(DEVICE), classes.to(DEVICE)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_ensemble_equals_its_members(options: dict[str, Any]) -> None:
    weights, x, classes = problem()
    newton = npl.functional.newton_loss(F.cross_entropy, **options)
    states = vmap(lambda w: newton.init(x[0] @ w.T))(weights)
    hooks = [npl.newton_loss(F.cross_entropy, **options) for _ in weights]
    for batch, target in zip(x, classes, strict=True):
        step = grad(lambda w, s, b=batch, t=target: newton.apply(s, b @ w.T, t), has_aux=True)
        found, states = vmap(step)(weights, states)
        for k, hook in enumerate(hooks):
            w = weights[k].clone().requires_grad_()
            hook(batch @ w.T, target).backward()
            assert w.grad is not None
            assert error(found[k], w.grad) <= 1e-10


@cuda_alone
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_replays_carry_the_state_that_is_copied_back(options: dict[str, Any]) -> None:
    weights, x, classes = problem()
    newton = npl.functional.newton_loss(F.cross_entropy, **options)
    w, b, t = weights[0].clone(), x[0].clone(), classes[0].clone()
    state = newton.init(b @ w.T)
    before = [leaf.clone() for leaf in tree_leaves(state)]

    def step(state: npl.functional.NewtonState) -> tuple[Tensor, npl.functional.NewtonState]:
        return grad(lambda w: newton.apply(state, b @ w.T, t), has_aux=True)(w)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(state)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, after = step(state)
        for old, new in zip(tree_leaves(state), tree_leaves(after), strict=True):
            old.copy_(new)
    assert all(torch.equal(a, b) for a, b in zip(before, tree_leaves(state), strict=True)), "capturing computes nothing"
    eager = tree_map(torch.clone, state)
    for batch, target in zip(x, classes, strict=True):
        b.copy_(batch)
        t.copy_(target)
        graph.replay()
        wanted, eager = step(eager)
        assert error(found, wanted) <= 1e-9
