"""Eight networks at once by ``vmap`` are eight networks one after the other: weights, states and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.twins import relative_error
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.utils._pytree import tree_leaves, tree_map

import newton_plugin as npl

MEMBERS, STEPS, BATCH = 8, 20, 12


def network(seed: int, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    """(members, steps, batch, ...): each member has its own order."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    t = (x.sum(-1) > 0).long() + (x[:, 0] > 1).long()
    order = torch.stack([torch.randint(60, (STEPS, BATCH), generator=generator) for _ in range(MEMBERS)])
    return x[order], t[order]


class Adam:
    """Adam as functions of tensors, for one member or many."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.first, self.second = (tree_map(torch.zeros_like, weights) for _ in range(2))
        self.count = 0

    def __call__(self, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        self.count += 1
        made = {}
        for name, g in gradients.items():
            self.first[name] = 0.9 * self.first[name] + 0.1 * g
            self.second[name] = 0.999 * self.second[name] + 0.001 * g.square()
            first, second = self.first[name] / (1 - 0.9**self.count), self.second[name] / (1 - 0.999**self.count)
            made[name] = weights[name] - 0.01 * first / (second.sqrt() + 1e-8)
        return made


def sgd(weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weights[name] - 0.3 * g for name, g in gradients.items()}


def optimizer(name: str, weights: dict[str, Tensor]) -> Any:
    return Adam(weights) if name == "adam" else sgd


def alone(member: int, name: str, rule: dict[str, Any], x: Tensor, t: Tensor) -> dict[str, Tensor]:
    """One network in a plain loop, by the live graph."""
    model, newton = network(member), npl.newton_loss(F.cross_entropy, **rule)
    weights = {k: p.detach().clone() for k, p in model.named_parameters()}
    update = optimizer(name, weights)
    for k in range(STEPS):
        leaves = {n: w.clone().requires_grad_() for n, w in weights.items()}
        loss = newton(functional_call(model, leaves, (x[k],)), t[k])
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        weights = update(weights, dict(zip(leaves, gradients, strict=True)))
    return weights


RULES: list[dict[str, Any]] = [
    {"structure": "isotropic"},
    {"curvature": "hessian"},
    {"structure": "mean"},
    {"curvature": "norm"},
]


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_eight_at_once(rule: dict[str, Any], name: str) -> None:
    x, t = data()
    models = [network(member) for member in range(MEMBERS)]
    weights, _ = stack_module_state(models)  # type: ignore[arg-type]
    weights = tree_map(torch.detach, weights)
    expected = [alone(member, name, rule, x[member], t[member]) for member in range(MEMBERS)]
    newton = npl.functional.newton_loss(F.cross_entropy, **rule)
    door = npl.newton_loss(F.cross_entropy, **rule)

    def loss(w: Any, state: Any, x: Tensor, t: Tensor) -> Any:
        return newton.apply(state, functional_call(models[0], w, (x,)), t)

    def wrapped(w: Any, x: Tensor, t: Tensor) -> Any:
        return door(functional_call(models[0], w, (x,)), t)

    states = vmap(lambda x: newton.init(functional_call(models[0], tree_map(lambda w: w[0], weights), (x,))))(x[:, 0])
    pure, hidden = weights, weights
    update, other = optimizer(name, weights), optimizer(name, weights)
    for k in range(STEPS):
        gradients, states = vmap(grad(loss, has_aux=True))(pure, states, x[:, k], t[:, k])
        pure = update(pure, gradients)
        hidden = other(hidden, vmap(grad(wrapped))(hidden, x[:, k], t[:, k]))
    for n in weights:
        together = torch.stack([w[n] for w in expected])
        assert relative_error(pure[n], together) <= 1e-12
        assert relative_error(hidden[n], together) <= 1e-12
        assert relative_error(together, weights[n]) > 1e-3, "they were trained"


def test_dropout_of_their_own() -> None:
    """With randomness="different" each member has its own noise; given that noise, its step is that of a loop."""
    model = network(0, dropout=0.5)
    weights = {k: p.detach() for k, p in model.named_parameters()}
    x, t = data()
    newton = npl.functional.newton_loss(F.cross_entropy)

    def loss(w: Any, x: Tensor, t: Tensor) -> Any:
        y = functional_call(model, w, (x,))
        return newton.apply(newton.init(y), y, t)[0], y

    torch.manual_seed(5)
    members = vmap(grad(loss, has_aux=True), in_dims=(None, 0, 0), randomness="different")
    gradients, outputs = members(weights, x[:, 0], t[:, 0])
    again, _ = members(weights, x[:, 0], t[:, 0])
    assert not torch.equal(gradients["3.weight"], again["3.weight"]), "the noise is drawn anew"
    for k in range(MEMBERS):
        y = outputs[k].clone().requires_grad_()
        npl.newton_loss(F.cross_entropy)(y * 1, t[k, 0]).backward()
        assert y.grad is not None
        # The bias of the last layer gets the sum of the steps over the samples.
        assert relative_error(gradients["3.bias"][k], y.grad.sum(0)) <= 1e-12


def test_members_may_change_places() -> None:
    """What a member does depends on it alone."""
    x, _ = data()
    outputs, t = x[:, 0, :, :3], data()[1][:, 0]
    newton = npl.functional.newton_loss(F.cross_entropy)
    order = torch.randperm(MEMBERS, generator=torch.Generator().manual_seed(1))

    def two_steps(outputs: Tensor, t: Tensor) -> tuple[Tensor, Any]:
        states = vmap(newton.init)(outputs)
        for scale in (1.0, -2.0):
            steps, states = vmap(grad(lambda y, s, t: newton.apply(s, y, t), has_aux=True))(scale * outputs, states, t)
        return steps, states

    steps, states = two_steps(outputs, t)
    moved, others = two_steps(outputs[order], t[order])
    assert relative_error(moved, steps[order]) <= 1e-13
    for a, b in zip(tree_leaves(others), tree_leaves(states), strict=True):
        torch.testing.assert_close(a, b[order], rtol=1e-13, atol=0)
