"""A running state belongs to the layer that made the outputs, and to nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import newton_plugin as npl

G = torch.Generator().manual_seed(0)
X = torch.randn(8, 5, generator=G, dtype=torch.float64)
T = torch.arange(8) % 3
Door = Callable[[], Callable[[Tensor], Tensor]]


def hooked() -> Callable[[Tensor], Tensor]:
    hook = npl.LossHook()
    return lambda y: hook(F.cross_entropy(y, T))


def wrapped() -> Callable[[Tensor], Tensor]:
    loss = npl.newton_loss(F.cross_entropy)
    return lambda y: loss(y, T)


DOORS = pytest.mark.parametrize("door", [hooked, wrapped])


def heads() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(5, 3).double(), nn.Linear(5, 3).double()


def gradient(door: Callable[[Tensor], Tensor], head: nn.Module, scale: float) -> Tensor:
    head.zero_grad()
    door(scale * head(X)).backward()
    return torch.cat([p.grad.flatten() for p in head.parameters() if p.grad is not None])


@DOORS
def test_two_tasks_in_turn_have_a_state_each(door: Door) -> None:
    (a, b), both = heads(), door()
    mixed = [gradient(both, head, scale) for _ in range(3) for head, scale in ((a, 1.0), (b, 100.0))]
    for which, (head, scale) in enumerate(((a, 1.0), (b, 100.0))):
        alone = door()
        for k in range(3):
            torch.testing.assert_close(mixed[2 * k + which], gradient(alone, head, scale), rtol=1e-12, atol=0)


@DOORS
def test_the_order_of_tasks_does_not_matter(door: Door) -> None:
    a, b = heads()
    first, second = door(), door()
    for head, scale in ((a, 1.0), (b, 100.0)):
        gradient(first, head, scale)
    for head, scale in ((b, 100.0), (a, 1.0)):
        gradient(second, head, scale)
    assert torch.equal(gradient(first, a, 1.0), gradient(second, a, 1.0))


def test_widths_that_change_have_one_state_where_c_is_one_number_and_one_each_where_it_is_a_matrix() -> None:
    head = nn.Linear(5, 1).double()
    for options, states in (({}, 1), ({"curvature": "norm"}, 1), ({"structure": "mean"}, 7)):
        hook = npl.LossHook(**options)  # type: ignore[arg-type]
        for width in range(2, 9):
            scores = head(torch.randn(6, width, 5, generator=G, dtype=torch.float64)).squeeze(-1)
            hook(F.cross_entropy(scores, torch.zeros(6, dtype=torch.int64))).backward()
        assert len(hook.state_dict()["rules"]) == states


def test_a_copy_meets_the_copied_layers_in_the_same_order() -> None:
    a, b = heads()
    door = npl.newton_loss(F.cross_entropy)
    hook = npl.LossHook()
    for head, scale in ((a, 1.0), (b, 100.0)):
        door(scale * head(X), T).backward()
        hook(F.cross_entropy(scale * head(X), T)).backward()
    with pytest.warns(UserWarning, match="in the order in which losses meet these"):
        twins = copy.deepcopy((a, b, door, hook))
    for one, other in (((a, b, door, hook), twins),):
        found = []
        for first, second, d, h in (one, other):
            for head, scale in ((first, 1.0), (second, 100.0)):
                head.zero_grad()
                d(scale * head(X), T).backward()
                h(F.cross_entropy(scale * head(X), T)).backward()
                found.append(head.weight.grad.clone())
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[1], found[3])


def test_two_parts_of_one_output_have_a_curvature_each_and_two_calls_share_one() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 6).double(), X

    def gaussian(mean: Tensor, spread: Tensor) -> Tensor:
        return (((mean - 1) / F.softplus(spread)).square() + F.softplus(spread).log()).mean()

    def rules(*arguments: Tensor) -> int:
        door = npl.newton_loss(gaussian, outputs=(0, 1))
        door(*arguments).backward()
        return len(door._rules)

    assert rules(*layer(x).chunk(2, -1)) == 2
    assert rules(layer(x), layer(-x)) == 1


def test_other_arguments_that_layers_made_are_reported_once_and_parameters_are_not() -> None:
    a, b = heads()
    loss = npl.newton_loss(lambda y, other: (y - other).square().mean())
    with pytest.warns(UserWarning, match=r"other arguments that require grad than outputs=\(0,\)"):
        loss(a(X), b(X)).backward()
    loss(a(X), b(X)).backward()  # a warning would be an error
    npl.newton_loss(lambda y, t: (y / t.exp()).square().mean())(a(X), nn.Parameter(torch.zeros(()))).backward()
    npl.newton_loss(lambda y, other: (y - other).square().mean(), outputs=(0, 1))(a(X), b(X)).backward()


def test_what_was_found_is_told() -> None:
    torch.manual_seed(0)
    net: Any = nn.ModuleDict({"head": nn.Linear(5, 3), "other": nn.Linear(5, 2)}).double()
    s = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    hook = npl.LossHook(structure="isotropic", module=net)
    assert hook.boundaries == ()
    assert hook.describe() == "no boundary yet"
    (F.cross_entropy(net["head"](X) * s.exp(), T)).backward()
    hook(F.cross_entropy(net["head"](X) * s.exp(), T) + net["other"](X).square().mean()).backward()
    head, other = sorted(hook.boundaries, key=lambda b: b.name)
    assert (head.name, head.shape, head.sample_dims, head.samples, head.features) == ("head", (8, 3), (0,), 8, 3)
    assert (other.name, other.shape, other.calls) == ("other", (8, 2), 1)
    assert head.beside == other.beside == ("parameter 0 (shape (1,))",)
    assert "'head' of shape (8, 3), 8 samples (dim 0) x 3 features" in hook.describe()
    assert "beside: parameter 0" in repr(hook)
    assert "EmpiricalFisher(structure='isotropic'" in head.curvature
    assert "AutoDamping" in head.damping


def test_with_names_a_resumed_hook_gives_every_layer_its_own_state_whatever_comes_first() -> None:
    nets = nn.ModuleDict({"a": nn.Linear(5, 3), "b": nn.Linear(5, 3)}).double()
    tasks = (("a", 1.0), ("b", 100.0))

    def turn(hook: npl.LossHook, name: str, scale: float) -> Tensor:
        nets.zero_grad()
        hook(F.cross_entropy(scale * nets[name](X), T)).backward()
        return nets[name].weight.grad.clone()

    hook = npl.LossHook(module=nets)
    for name, scale in tasks * 2:
        turn(hook, name, scale)
    resumed = npl.LossHook(module=nets)
    resumed.load_state_dict(hook.state_dict())
    turn(hook, "a", 1.0)
    assert torch.equal(turn(resumed, "b", 100.0), turn(hook, "b", 100.0))


def test_without_names_a_state_of_several_losses_says_that_it_goes_by_order() -> None:
    a, b = heads()
    hook = npl.LossHook()
    for head in (a, b):
        hook(F.cross_entropy(head(X), T)).backward()
    with pytest.warns(UserWarning, match="pass module= to both hooks"):
        npl.LossHook().load_state_dict(hook.state_dict())
    one_loss = npl.LossHook()
    one_loss(F.cross_entropy(a(X), T) + F.cross_entropy(b(X), T)).backward()
    npl.LossHook().load_state_dict(one_loss.state_dict())


def test_an_input_that_requires_grad_is_no_part_of_the_layer() -> None:
    a, _ = heads()
    ours, theirs = npl.LossHook(), npl.LossHook()
    for scale in range(1, 6):
        found = []
        for hook, x in ((ours, (scale * X).requires_grad_()), (theirs, scale * X)):
            a.zero_grad()
            hook(F.cross_entropy(a(x), T)).backward()
            found.append(a.weight.grad.clone())
        assert torch.equal(*found)
    assert len(ours.state_dict()["rules"]) == 1


@pytest.mark.parametrize(
    ("structure", "mean"),
    [("isotropic", lambda state: state), ("gated", lambda state: state["mean"])],
    ids=["isotropic", "gated"],
)
def test_a_loss_of_many_heads_keeps_all_their_states(structure: Any, mean: Callable[[Any], Any]) -> None:
    torch.manual_seed(0)
    many = [nn.Linear(5, 3).double() for _ in range(70)]
    hook = npl.LossHook(structure=structure, damping=npl.AutoDamping(decay=0.99))
    for _ in range(3):
        hook(sum(F.cross_entropy(head(X), T) for head in many)).backward()  # type: ignore[arg-type]
    counts = {float(mean(rule["curvature"])["count"]) for rule in hook.state_dict()["rules"].values()}
    assert len(hook.state_dict()["rules"]) == 70
    assert len(counts) == 1


def test_a_layer_at_the_address_of_one_that_is_gone_is_another() -> None:
    """Networks that are dropped and made again under one hook: each begins with a state of its own."""
    torch.manual_seed(0)
    hook, seen = npl.LossHook(), set()
    x, t = torch.randn(8, 3), torch.randint(0, 2, (8,))
    for k in range(40):
        net = nn.Linear(3, 2)
        again = id(net.weight) in seen
        seen.add(id(net.weight))
        hook(F.cross_entropy(net(x), t)).backward()
        fresh = copy.deepcopy(net)
        fresh.zero_grad()
        npl.LossHook()(F.cross_entropy(fresh(x), t)).backward()
        assert net.weight.grad is not None
        torch.testing.assert_close(
            net.weight.grad, fresh.weight.grad, msg=f"network {k}, its address was used: {again}"
        )
        del net, fresh
    assert len(seen) < 40, "no address was used again"
