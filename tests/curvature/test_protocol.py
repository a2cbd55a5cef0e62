"""A curvature and a damping of a user's own: one subclass with one method, and what it is given and spared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import newton_plugin as npl
from newton_plugin._curvature.finiteness import Finiteness
from newton_plugin._runtime.processes import ONE_PROCESS
from newton_plugin._step.rule import StepRule


class Halved(npl.Curvature):
    """The least that a curvature is."""

    def step(self, gradient: Tensor, hvp: Any, damping: npl.Damping) -> npl.CurvatureStep:
        return npl.CurvatureStep(gradient / 2, gradient.new_zeros(()))


class WithRanks(Halved):
    def step(self, gradient: Tensor, hvp: Any, damping: npl.Damping, ranks: Any = None) -> npl.CurvatureStep:
        assert ranks is None
        return super().step(gradient, hvp, damping)


class WithRanksByName(npl.EmpiricalFisher):
    def step(self, gradient: Tensor, hvp: Any, damping: npl.Damping, **ranks: Any) -> npl.CurvatureStep:
        return super().step(gradient, hvp, damping, **ranks)


class WithWhatever(npl.EmpiricalFisher):
    """May or may not use what it is given: nobody can tell."""

    def step(self, gradient: Tensor, hvp: Any, damping: npl.Damping, **_: Any) -> npl.CurvatureStep:
        return super().step(gradient, hvp, damping)


class WithEverything(npl.EmpiricalFisher):
    """The whole signature, as a type checker asks for it; made for gradients as they are."""

    def step(
        self,
        gradient: Tensor,
        hvp: Any,
        damping: npl.Damping,
        ranks: Any = ONE_PROCESS,
        groups: int = 1,
        weight: Tensor | None = None,
    ) -> npl.CurvatureStep:
        return super().step(gradient.clamp(-1e-3, 1e-3), hvp, damping, ranks, groups, weight)


class Streaming(WithEverything):
    """Says that its step knows weights."""

    streams = npl.EmpiricalFisher.streams


class Inherited(npl.EmpiricalFisher):
    """No step of its own."""


def test_one_method_is_enough() -> None:
    y = torch.randn(6, 3, requires_grad=True)
    hook = npl.LossHook(curvature=Halved())
    hook(y.square().sum(-1).mean()).backward()
    torch.testing.assert_close(y.grad, y.detach() / 6)
    said = hook.diagnostics()
    assert said["fallbacks"] == 0
    assert said["step_norm"] == pytest.approx(said["gradient_norm"] / 2)
    assert said["eig_min"] != said["eig_min"], "nobody knows the eigenvalues: NaN"
    assert hook.state_dict()["rules"][next(iter(hook.state_dict()["rules"]))]["curvature"] == {}


def test_its_nan_is_noticed_though_it_says_nothing() -> None:
    y = torch.randn(6, 3, requires_grad=True)
    hook = npl.LossHook(curvature=Halved())
    weights = torch.ones(6, 3)
    weights[1, 2] = torch.nan
    hook((y * weights).sum(-1).mean()).backward()
    assert y.grad is not None
    torch.testing.assert_close(y.grad, weights / 6, equal_nan=True)  # the plain gradient
    assert hook.diagnostics()["fallbacks"] == 1


@pytest.mark.parametrize(
    ("curvature", "ranks", "weight"),
    [
        (Halved, False, False),
        (WithRanks, True, False),
        (WithRanksByName, True, False),
        (WithWhatever, False, False),
        (WithEverything, True, False),
        (Streaming, True, True),
        (Inherited, True, True),
        (npl.EmpiricalFisher, True, True),
        (npl.SoftNormalization, True, True),
        (npl.Hessian, True, False),
    ],
)
def test_step_is_given_what_it_has_arguments_for(curvature: type[npl.Curvature], ranks: bool, weight: bool) -> None:
    assert (curvature.takes_ranks, curvature.takes_weight) == (ranks, weight)
    large = torch.zeros(64, 2**14)
    assert StepRule(curvature(), npl.Tikhonov(0.1)).streams(large) == weight


def test_what_is_not_a_curvature_is_refused_with_the_remedy() -> None:
    class Alike:
        needs_hessian = False

        def step(self, gradient: Tensor, hvp: Any, damping: npl.Damping) -> Any: ...

    for wrong in (Alike(), Halved):  # an object that only looks like one; a class in place of an instance
        with pytest.raises(npl.ArgumentTypeError, match=r"A curvature of your own is a subclass of npl\.Curvature"):
            npl.LossHook(curvature=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="abstract"):
        npl.Curvature()  # type: ignore[abstract]


def test_what_returns_something_else_is_told_what_to_return() -> None:
    class Bare(npl.Curvature):
        def step(self, gradient: Tensor, hvp: Any, damping: npl.Damping) -> Any:
            return gradient

    class Number(npl.Damping):
        def value(self, scale: Tensor) -> Any:
            return "0.5"

    class Half(npl.Damping):
        def value(self, scale: Tensor) -> Any:
            return 0.5

    y = torch.randn(4, 3)
    with pytest.raises(npl.ArgumentTypeError, match=r"step\(\) must return a npl\.CurvatureStep; got Tensor"):
        npl.newton_step(lambda y: y.square().mean(), y, curvature=Bare())
    for structure in ("isotropic", "mean", "per_sample"):
        with pytest.raises(npl.ArgumentTypeError, match=r"value\(scale\) must return a tensor; got '0\.5' of type str"):
            npl.newton_step(lambda y: y.square().mean(), y, damping=Number(), structure=structure)  # type: ignore[arg-type]
        half = npl.newton_step(lambda y: y.square().mean(), y, damping=Half(), structure=structure)  # type: ignore[arg-type]
        assert float(half.damping) == 0.5


def test_a_damping_of_ones_own_promises_nothing() -> None:
    class Zero(npl.AutoDamping):
        def value(self, scale: Tensor) -> Tensor:  # type: ignore[override]
            return torch.zeros_like(scale)

    class Faded(npl.Tikhonov):
        def value(self, scale: Tensor) -> Tensor:
            return scale * self.damping

    class Renamed(npl.AutoDamping):
        """Inherits the value, and what is promised of it."""

    class Mixin:
        def value(self, scale: Tensor) -> Tensor:
            return scale / 2 + 1e-3

    class Mixed(Mixin, npl.Tikhonov):
        pass

    class MixedAuto(Mixin, npl.AutoDamping):
        pass

    class BuiltIn(npl.Damping):
        value = staticmethod(torch.sqrt)  # type: ignore[assignment]

    assert (npl.AutoDamping.bounded, Zero.bounded, Renamed.bounded) == (True, False, False)
    assert (Mixed.needs_scale, MixedAuto.takes_finite, BuiltIn.takes_finite) == (True, False, False)
    g = torch.randn(5, 3, dtype=torch.float64)
    for kind in (Mixed, MixedAuto):
        c = float(g.square().mean())
        assert float(npl.EmpiricalFisher("isotropic").step(g, None, kind()).damping) == pytest.approx(c / 2 + 1e-3)
    assert (npl.AutoDamping.takes_finite, Zero.takes_finite, Renamed.takes_finite) == (True, False, True)
    assert (npl.Tikhonov.needs_scale, Faded.needs_scale) == (False, True)
    # (C + 0)^-1 of gradients that are zero is 0 / 0: noticed, and the gradient stays.
    y = torch.zeros(4, 1, requires_grad=True)
    hook = npl.LossHook(structure="per_sample", damping=Zero())
    hook((0 * y).sum(-1).mean()).backward()
    assert y.grad is not None
    assert bool((y.grad == 0).all())
    assert hook.diagnostics()["fallbacks"] == 1
    # And the scale reaches a rule that looks at it.
    g = torch.randn(5, 3, dtype=torch.float64)
    taken = npl.EmpiricalFisher("isotropic").step(g, None, Faded(0.5))
    assert float(taken.damping) == pytest.approx(0.5 * float(g.square().mean()))


def test_the_verdict_needs_no_witness() -> None:
    fine, bad = torch.ones(3, 2, dtype=torch.float64), torch.tensor([[1.0, torch.nan]], dtype=torch.float64)
    yes, no = torch.tensor(True), torch.tensor(False)
    cases = [
        (Finiteness(), fine, True),
        (Finiteness(), bad, False),
        (Finiteness(no), fine, False),
        (Finiteness(yes), bad, False),
        (Finiteness(yes, bounded=True), fine, True),
        (Finiteness(no, bounded=True), fine, False),
        (Finiteness(witness=torch.tensor(torch.inf)), fine, False),
        (Finiteness(witness=torch.tensor([1.0, torch.nan])), fine, False),
        (Finiteness(yes, witness=torch.tensor(2.0)), fine, True),
    ]
    for finiteness, rows, wanted in cases:
        assert bool(finiteness.judge(rows, rows, ONE_PROCESS)) == wanted
        assert bool(finiteness.taken) == wanted
