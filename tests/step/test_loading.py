"""A state of other settings, or one that is not finite, is an error where it is loaded and not at a later step."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import newton_plugin as npl

G = torch.Generator().manual_seed(0)
X, T = torch.randn(8, 4, generator=G), torch.arange(8) % 3
OPTIONS: dict[str, dict[str, Any]] = {
    "fisher": {},
    "isotropic": {"structure": "isotropic"},
    "gated": {"structure": "gated"},
    "fisher, fixed damping": {"damping": 0.1},
    "hessian": {"curvature": "hessian"},
    "kept": {"curvature": npl.EmpiricalFisher(refresh_every=3)},
}


def trained(options: dict[str, Any]) -> npl.LossHook:
    torch.manual_seed(0)
    net, hook = nn.Linear(4, 3), npl.LossHook(**options)
    for _ in range(2):
        hook(F.cross_entropy(net(X), T)).backward()
    return hook


def test_a_state_of_the_same_settings_is_restored() -> None:
    for options in OPTIONS.values():
        state = trained(options).state_dict()
        other = npl.LossHook(**options)
        other.load_state_dict(state)
        assert str(other.state_dict()) == str(state)


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.permutations(OPTIONS, 2)))
def test_a_state_of_other_settings_is_refused_or_used(saved: str, loaded: str) -> None:
    state, hook = trained(OPTIONS[saved]).state_dict(), trained(OPTIONS[loaded])
    before, refused = str(hook.state_dict()), False
    try:
        hook.load_state_dict(state)
    except npl.ArgumentError:
        refused = True
    if refused:
        assert str(hook.state_dict()) == before, "nothing is changed"
    hook(F.cross_entropy(nn.Linear(4, 3)(X), T)).backward()
    assert hook.diagnostics()["fallbacks"] == 0


def test_fisher_and_hessian_do_not_mix() -> None:
    for saved, loaded in (("fisher", "hessian"), ("hessian", "fisher")):
        with pytest.raises(npl.ArgumentError, match=r"state was not saved with curvature=.*Load a state with"):
            npl.LossHook(**OPTIONS[loaded]).load_state_dict(trained(OPTIONS[saved]).state_dict())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("structure", "mean"),
    [
        ("isotropic", lambda state: state["mean"]),
        ("gated", lambda state: state["mean"]["mean"]),
        ("gated", lambda state: state["weighted"]["mean"]),
    ],
    ids=["isotropic", "gated", "gated, of the steps"],
)
def test_a_state_that_is_not_finite_is_refused(structure: str, mean: Callable[[Any], Tensor], bad: float) -> None:
    hook = trained({"structure": structure})
    state = copy.deepcopy(hook.state_dict())
    mean(next(iter(state["rules"].values()))["curvature"]).fill_(bad)
    with pytest.raises(npl.ArgumentError, match="running mean that is not finite"):
        hook.load_state_dict(state)


def test_a_kept_curvature_that_is_not_finite_is_restored_as_such() -> None:
    options: dict[str, Any] = {"curvature": npl.EmpiricalFisher(refresh_every=3), "damping": 0.1}
    net, hook, other = nn.Linear(4, 3), npl.LossHook(**options), npl.LossHook(**options)
    hook((net(X) * float("nan")).sum(-1).mean()).backward()
    other.load_state_dict(hook.state_dict())
    assert str(other.state_dict()) == str(hook.state_dict())
