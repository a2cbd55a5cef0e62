"""What ``sync="lagged"`` takes; in one process it is the step of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.cases import curved
from torch import nn

import newton_plugin as npl

TAKEN: list[dict[str, Any]] = [
    {"structure": "isotropic"},
    {"structure": "isotropic", "damping": 0.1, "power": 0.5},
    {"structure": "per_sample"},
    {"curvature": "norm"},
    {"curvature": npl.EmpiricalFisher("isotropic")},
]
DEFAULTS: list[dict[str, Any]] = [{}, {"curvature": "auto"}]
REFUSED: list[dict[str, Any]] = [
    {"structure": "mean"},
    {"damping": 0.1},
    {"structure": "diagonal"},
    {"structure": "block"},
    {"curvature": "hessian"},
    {"curvature": npl.EmpiricalFisher("isotropic", refresh_every=3)},
]


@pytest.mark.parametrize(
    ("given", "same"), [*((t, t) for t in TAKEN), *((d, {"structure": "isotropic"}) for d in DEFAULTS)], ids=str
)
def test_alone_it_changes_nothing(given: dict[str, Any], same: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, x, t = nn.Linear(4, 3).double(), torch.randn(3, 6, 4).double(), torch.rand(3, 6, 3).double()
    hooks = [npl.LossHook(**given, sync="lagged"), npl.LossHook(**same, sync=False)]
    wrapped = npl.newton_loss(curved, **given, sync="lagged")
    for k in range(3):
        sent = []
        for loss_of in (lambda y, t: hooks[0](curved(y, t)), lambda y, t: hooks[1](curved(y, t)), wrapped):
            model.zero_grad()
            loss_of(model(x[k]), t[k]).backward()
            assert model.weight.grad is not None
            sent.append(model.weight.grad)
        assert torch.equal(sent[0], sent[1])
        assert torch.equal(sent[2], sent[1])


@pytest.mark.parametrize("options", REFUSED, ids=str)
def test_a_c_of_other_samples_is_refused(options: dict[str, Any]) -> None:
    for door in (npl.LossHook, lambda **given: npl.newton_loss(curved, **given)):
        with pytest.raises(
            npl.ArgumentError, match=r"sync='lagged' takes .*; got .*Use curvature='fisher' .*sync=True"
        ):
            door(**options, sync="lagged")


def test_a_curvature_of_the_users_own_is_refused() -> None:
    """Its step may use other numbers than those of the class that it extends."""

    class Own(npl.EmpiricalFisher):
        def step(self, *arguments: Any, **more: Any) -> npl.CurvatureStep:  # type: ignore[override]
            return super().step(*arguments, **more)

    class Renamed(npl.EmpiricalFisher):
        pass

    with pytest.raises(npl.ArgumentError, match="statistics are one number"):
        npl.LossHook(curvature=Own("isotropic"), sync="lagged")
    npl.LossHook(curvature=Renamed("isotropic"), sync="lagged")


def test_who_raises_has_to_wait() -> None:
    with pytest.raises(npl.ArgumentError, match=r"on_nonfinite='raise' .*sync=True"):
        npl.LossHook(sync="lagged", on_nonfinite="raise")


@pytest.mark.parametrize("sync", [None, 1, 0.0])
def test_another_type(sync: Any) -> None:
    with pytest.raises(npl.ArgumentTypeError, match="sync must be True, False or 'lagged'; got"):
        npl.LossHook(sync=sync)


def test_another_word() -> None:
    with pytest.raises(npl.ArgumentError, match="sync must be one of True, False, 'lagged'; got 'late'"):
        npl.LossHook(sync="late")  # type: ignore[arg-type]
