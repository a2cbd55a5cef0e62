"""States: pytrees of tensors, to and from those of a hook, copied, pickled, refused where they do not fit."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import newton_plugin as npl
from newton_plugin.functional import NewtonState

RULES: list[dict[str, Any]] = [
    {},
    {"structure": "mean"},
    {"curvature": "hessian"},
    {"curvature": "norm"},
    {"structure": "diagonal", "damping": 0.1},
]
G = torch.Generator().manual_seed(0)
DATA = [(torch.randn(6, 3, generator=G, dtype=torch.float64), torch.randint(0, 3, (6,), generator=G)) for _ in range(6)]


class Pure:
    """Training by the pure engine."""

    def __init__(self, rule: dict[str, Any]) -> None:
        self.newton = npl.functional.newton_loss(F.cross_entropy, **rule)
        self.state = self.newton.init(DATA[0][0])

    def step(self, y: Tensor, t: Tensor) -> Tensor:
        gradient, self.state = grad(lambda v: self.newton.apply(self.state, v, t), has_aux=True)(y)
        return gradient

    def save(self) -> dict[str, Any]:
        return self.newton.state_dict(self.state)

    def load(self, saved: dict[str, Any]) -> None:
        self.state = self.newton.load_state_dict(saved, DATA[0][0])


class Hooked:
    """Training by a hook."""

    def __init__(self, rule: dict[str, Any]) -> None:
        self.hook = npl.LossHook(**rule)

    def step(self, y: Tensor, t: Tensor) -> Tensor:
        y = y.clone().requires_grad_()
        self.hook(F.cross_entropy(y * 1, t)).backward()
        assert y.grad is not None
        return y.grad

    def save(self) -> dict[str, Any]:
        return self.hook.state_dict()

    def load(self, saved: dict[str, Any]) -> None:
        self.hook.load_state_dict(saved)


def through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("first", "second"), [(Pure, Hooked), (Hooked, Pure), (Pure, Pure)])
def test_training_goes_on_after_conversion(first: Any, second: Any, rule: dict[str, Any]) -> None:
    """As unbroken training does, both ways, by a checkpoint that is loaded with ``weights_only=True``."""
    unbroken = Hooked(rule)
    expected = torch.stack([unbroken.step(*batch) for batch in DATA])
    before, after, fresh = first(rule), second(rule), second(rule)
    found = [before.step(*batch) for batch in DATA[:3]]
    after.load(through_a_file(before.save()))
    found += [after.step(*batch) for batch in DATA[3:]]
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-12, atol=1e-15)
    if rule.get("damping") is None and rule.get("curvature") != "norm":  # whose slow mean is a bound alone
        assert not torch.allclose(fresh.step(*DATA[3]), expected[3]), "the state matters"
    assert {"rules", "in_turn", "found_once", "skipped"} <= after.save().keys()
    assert len(after.save()["rules"]) == 1


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_state_is_a_pytree_of_tensors(rule: dict[str, Any]) -> None:
    trained = Pure(rule)
    trained.step(*DATA[0])
    leaves, form = tree_flatten(trained.state)
    assert leaves
    assert all(type(leaf) is Tensor and not leaf.requires_grad for leaf in leaves)
    assert form == tree_flatten(Pure(rule).state)[1], "the first state has the form of all"
    again = tree_unflatten(leaves, form)
    assert isinstance(again, NewtonState)
    assert tree_flatten(trained.newton.load_state_dict(trained.save(), DATA[0][0]))[1] == form
    assert tree_leaves(copy.deepcopy(trained.state))[0].equal(leaves[0])


def test_one_member_of_many() -> None:
    newton = npl.functional.newton_loss(F.cross_entropy, curvature="hessian")
    ys = torch.stack([y for y, _ in DATA])
    states = vmap(lambda y: newton.apply(newton.init(y), y, DATA[0][1])[1])(ys)
    with pytest.raises(npl.ArgumentError, match=r"state holds \(6,\) members of a vmap"):
        newton.state_dict(states)
    alone = newton.apply(newton.init(ys[2]), ys[2], DATA[0][1])[1]
    member = newton.load_state_dict(newton.state_dict(tree_map(lambda t: t[2], states)), ys[2])
    for a, b in zip(tree_leaves(member), tree_leaves(alone), strict=True):
        if a.dtype != torch.bool:  # whether samples were found independent: nobody looks under vmap
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def good() -> dict[str, Any]:
    trained = Pure({})
    trained.step(*DATA[0])
    return copy.deepcopy(trained.save())


def changed(**parts: Any) -> dict[str, Any]:
    saved = good()
    saved["rules"]["0"] |= parts
    return saved


@pytest.mark.parametrize(
    ("saved", "error", "words"),
    [
        (None, npl.ArgumentTypeError, "with the entry 'rules'"),
        (3, npl.ArgumentTypeError, "got int"),
        ({}, npl.ArgumentTypeError, "with the entry 'rules'"),
        ({"rules": []}, npl.ArgumentTypeError, "with the entry 'rules'"),
        ({"rules": {}}, npl.ArgumentError, "one rule for each of outputs"),
        ({"rules": {"0": None}}, npl.ArgumentError, "was not saved with curvature"),
        ({"rules": {"0": {}}}, npl.ArgumentError, "was not saved with curvature"),
        (changed(curvature={}), npl.ArgumentError, None),
        (changed(damping={"other": 1}), npl.ArgumentError, "was not saved with damping"),
        (changed(kept="x"), npl.ArgumentError, "as 'kept'"),
        (changed(kept=torch.zeros(2)), npl.ArgumentError, "another shape"),
        (changed(damping={"mean": torch.tensor(torch.nan), "count": torch.ones(())}), npl.ArgumentError, "not finite"),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_wrong_states_are_refused_by_name(saved: Any, error: type[Exception], words: str | None) -> None:
    if words is None:  # a rule that has not met a batch: the state before the first step
        assert tree_leaves(Pure({}).newton.load_state_dict(saved, DATA[0][0]))
        return
    with pytest.raises(error, match=words):
        Pure({}).load(saved)


def test_states_of_other_settings_and_shapes() -> None:
    y, t = DATA[0]
    states = {}
    for name, rule in (("fisher", {}), ("hessian", {"curvature": "hessian"}), ("mean", {"structure": "mean"})):
        trained = Pure(rule)
        trained.step(y, t)
        states[name] = trained
    for name, trained in states.items():
        for other, given in states.items():
            if name != other:
                with pytest.raises((npl.ArgumentError, npl.ShapeError), match="state"):
                    trained.newton.apply(given.state, y, t)
    wide = torch.randn(6, 5, dtype=torch.float64)
    with pytest.raises(npl.ShapeError, match="does not fit outputs of shape"):
        states["mean"].newton.apply(states["mean"].state, wide, t)
    with pytest.raises(npl.ArgumentError, match="another shape"):
        states["mean"].newton.load_state_dict(states["mean"].save(), wide)
    newton = npl.functional.newton_loss(F.cross_entropy, damping=0.1)
    stacked = vmap(newton.init)(torch.stack([y, y]))
    with pytest.raises(npl.ArgumentError, match="several members of a vmap"):
        newton.apply(stacked, y, t)
    for wrong in (None, y, {}, NewtonState(None), NewtonState({})):  # type: ignore[arg-type]
        with pytest.raises((npl.ArgumentTypeError, npl.ArgumentError), match="state must be"):
            newton.apply(wrong, y, t)  # type: ignore[arg-type]
    for rules in ({"0": None}, {"0": {}}):
        with pytest.raises(npl.ArgumentError, match="the state of outputs='0' is none of"):
            newton.apply(NewtonState(rules), y, t)  # type: ignore[arg-type]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
def test_copies_go_on(copied: Any) -> None:
    y, t = DATA[0]
    newton = npl.functional.newton_loss(F.cross_entropy, curvature="hessian")
    assert repr(copied(newton)) == repr(newton)
    state = newton.init(y)
    assert torch.equal(copied(newton).apply(state, y, t)[0], newton.apply(state, y, t)[0])
    door = npl.newton_loss(F.cross_entropy)
    members = torch.stack([y for y, _ in DATA])

    def steps(loss: Any) -> Tensor:
        return vmap(grad(lambda v: loss(v, t)))(members.flip(0))

    vmap(grad(lambda v: door(v, t)))(members)
    other, fresh = copied(door), npl.newton_loss(F.cross_entropy)
    expected = steps(door)
    assert torch.equal(steps(other), expected)
    assert not torch.equal(steps(fresh), expected)


def test_a_state_by_position_meets_layers_by_their_order() -> None:
    """Two outputs: the hook has them by the names of its layers; it may be saved again before it has met them."""

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return a.cosh().mean() + b.exp().sum(-1).mean()

    torch.manual_seed(0)
    heads = torch.nn.ModuleList([torch.nn.Linear(4, 3), torch.nn.Linear(4, 2)]).double()
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    unbroken, other = npl.LossHook(structure="mean"), npl.LossHook(structure="mean")
    newton = npl.functional.newton_loss(loss, structure="mean", outputs=(0, 1))
    first = [head(x[0]).detach() for head in heads]
    _, state = newton.apply(newton.init(*first), *first)
    waiting = npl.LossHook(structure="mean")
    waiting.load_state_dict(newton.state_dict(state))
    other.load_state_dict(through_a_file(waiting.state_dict()))
    for hook, batches in ((unbroken, x), (other, x[1:])):
        for batch in batches:
            heads.zero_grad()
            hook(loss(*(head(batch) for head in heads))).backward()
        gradients = [p.grad.clone() for p in heads.parameters() if p.grad is not None]
        if hook is unbroken:
            expected = gradients
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    assert other.state_dict()["rules"].keys() == unbroken.state_dict()["rules"].keys()


def test_repr_names_arguments_of_the_function() -> None:
    newton = npl.functional.newton_loss(torch.nn.functional.cross_entropy, damping=0.1)
    assert repr(newton) == "newton_plugin.functional.newton_loss(cross_entropy, damping=0.1)"
