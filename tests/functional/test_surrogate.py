"""What the returned loss is around its outputs: the quadratic surrogate with its target held. And that it is pure."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.twins import relative_error
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves, tree_map

import newton_plugin as npl

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own forward mode
quick = settings(deadline=None, derandomize=True, max_examples=15)
RULES: list[dict[str, Any]] = [
    {"structure": "isotropic"},
    {"structure": "gated"},
    {"curvature": "hessian"},
    {"curvature": "norm"},
    {"structure": "per_sample", "power": 0.5},
    {"structure": "mean", "damping": 0.1},
]


def case(n: int, m: int, seed: int) -> tuple[Tensor, Tensor]:
    y, t = torch.randn(2, n, m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return y, t


def convex(y: Tensor, t: Tensor) -> Tensor:
    return ((y - t).cosh().sum(-1) + 0.1 * (y - t).sum(-1).square()).mean()


def applied(rule: dict[str, Any], t: Tensor) -> Any:
    newton = npl.functional.newton_loss(convex, **rule)
    return lambda v: newton.apply(newton.init(v), v, t)[0]


@quick
@given(n=st.integers(1, 5), m=st.integers(1, 4), seed=st.integers(0, 1000), rule=st.sampled_from(RULES))
def test_derivatives_are_those_of_the_surrogate(n: int, m: int, seed: int, rule: dict[str, Any]) -> None:
    y, t = case(n, m, seed)
    f = applied(rule, t)
    step = npl.newton_step(convex, y, t, **rule)

    def surrogate(v: Tensor) -> Tensor:
        return npl.quadratic_surrogate(v, step.target)

    assert relative_error(grad(f)(y), grad(surrogate)(y)) <= 1e-11
    identity = hessian(surrogate)(y)
    for second in (hessian, lambda g: jacrev(jacrev(g)), lambda g: jacrev(jacfwd(g)), lambda g: jacfwd(jacfwd(g))):
        assert relative_error(second(f)(y), identity) <= 1e-12
    v = t.sin()
    forward, pull = jvp(f, (y,), (v,))[1], vjp(f, y)[1]
    torch.testing.assert_close(forward, (pull(torch.ones_like(forward))[0] * v).sum(), rtol=1e-11, atol=1e-14)
    # Along a line the surrogate is a parabola: its difference quotient is exact.
    h = 1e-3
    quotient = (surrogate(y + h * v) - surrogate(y - h * v)) / (2 * h)
    torch.testing.assert_close(forward, quotient, rtol=1e-8, atol=1e-10)


@quick
@given(n=st.integers(1, 5), m=st.integers(1, 4), seed=st.integers(0, 1000), rule=st.sampled_from(RULES))
def test_samples_may_change_places(n: int, m: int, seed: int, rule: dict[str, Any]) -> None:
    y, t = case(n, m, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    moved = grad(applied(rule, t[order]))(y[order])
    assert relative_error(moved, grad(applied(rule, t))(y)[order]) <= 1e-10


class Counting(npl.Curvature):
    """A curvature of a user's own, which changes its state in place."""

    def __repr__(self) -> str:  # the name of a test, the same in every process
        return "Counting()"

    def __init__(self) -> None:
        self.steps = torch.zeros(())

    def step(self, gradient: Tensor, hvp: Any, damping: Any) -> npl.CurvatureStep:
        self.steps += 1
        return npl.CurvatureStep(gradient / self.steps, damping=gradient.new_zeros(()))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


@pytest.mark.parametrize("rule", [*RULES, {"curvature": Counting()}], ids=str)
def test_applied_twice_from_one_state_is_the_same(rule: dict[str, Any]) -> None:
    """Nothing is remembered, and the old state is as it was, to the bit: also with a curvature that works in place."""
    y, t = case(6, 3, 0)
    newton = npl.functional.newton_loss(convex, **rule)
    _, state = newton.apply(newton.init(y), y, t)
    members = tree_map(lambda s: torch.stack([s, s]), state)
    for many, given_state, outputs in ((False, state, y + 1), (True, members, torch.stack([y + 1, y - 1]))):
        kept = copy.deepcopy(given_state)

        def f(s: Any, v: Tensor) -> Any:
            return grad(lambda u: newton.apply(s, u, t), has_aux=True)(v)

        run = vmap(f) if many else f
        first, second = run(given_state, outputs), run(given_state, outputs)
        for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True):
            assert torch.equal(a, b)
        for a, b in zip(tree_leaves(given_state), tree_leaves(kept), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(tree_leaves(newton.apply(state, y + 1, t)[1])[0], tree_leaves(state)[0]) or "damping" in rule


def wrapped_tensors() -> list[Tensor]:
    """All tensors of some level that are alive."""
    gc.collect()
    alive = [o for o in gc.get_objects() if issubclass(type(o), Tensor)]
    assert alive
    return [o for o in alive if torch._C._functorch.is_functorch_wrapped_tensor(o)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_tensor_of_a_dead_level_is_kept(rule: dict[str, Any]) -> None:
    """What a step leaves behind in Python objects are plain tensors."""
    before = {id(tensor) for tensor in wrapped_tensors()}  # of other tests: what failed there keeps its frames
    y, t = case(6, 3, 0)
    newton, door = npl.functional.newton_loss(convex, **rule), npl.newton_loss(convex, **rule)
    members = torch.stack([y, -y])
    results = [
        vmap(grad(lambda v: newton.apply(newton.init(v), v, t), has_aux=True))(members),
        jacfwd(jacrev(lambda v: door(v, t)))(y),
        vmap(grad(lambda v: door(v, t)))(members),
        vmap(lambda v: npl.newton_step(convex, v, t, **rule))(members),
    ]
    assert len(results) == 4
    assert not [tensor for tensor in wrapped_tensors() if id(tensor) not in before]


def test_the_value_is_that_of_the_loss() -> None:
    """To the bit, also of each member."""
    y, t = case(6, 3, 0)
    members, classes = torch.stack([y, -y, 3 * y]), (t.argmax(-1))
    newton = npl.functional.newton_loss(F.cross_entropy)
    values = vmap(lambda v: newton.apply(newton.init(v), v, classes)[0])(members)
    assert torch.equal(values, vmap(lambda v: F.cross_entropy(v, classes))(members))
