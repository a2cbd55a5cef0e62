"""Every error on purpose: the argument, the rule, what was received, what to do next."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import newton_plugin as npl

Y = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)
T = torch.tensor([0, 1, 2, 0])


def info_nce(y: Tensor, t: Tensor) -> Tensor:
    """Each sample's loss depends on the others' outputs."""
    return F.cross_entropy(y @ y.T, torch.arange(len(y)))


ARGUMENTS = [
    (
        {"curvature": "fischer"},
        ValueError,
        r"curvature must be one of 'fisher', .*, 'auto'; got 'fischer'",
    ),
    ({"curvature": 3}, TypeError, r"curvature must be one of .* or an instance .*; got 3 of type int"),
    ({"curvature": npl.Hessian}, TypeError, r"curvature must be one of"),
    ({"curvature": npl.Hessian(), "power": 0.5}, ValueError, r"structure and power belong to the instance"),
    (
        {"structure": "diag"},
        ValueError,
        r"structure must be one of 'auto', 'mean', .*, 'block', 'gated'; got 'diag'",
    ),
    ({"power": 2}, ValueError, r"power must be one of 1.0, 0.5; got 2.0"),
    ({"power": "1"}, ValueError, r"power must be one of 1.0, 0.5; got '1'"),
    ({"damping": 0}, ValueError, r"damping must be positive and finite; got 0\. Larger is safer"),
    ({"damping": -1.0}, ValueError, r"damping must be positive and finite; got -1.0"),
    ({"damping": float("nan")}, ValueError, r"damping must be positive and finite; got nan"),
    ({"damping": True}, TypeError, r"damping must be a positive number; got True of type bool"),
    (
        {"damping": "automatic"},
        ValueError,
        r"damping must be .*, 'auto' or an instance .*; got 'automatic'",
    ),
    ({"damping": []}, TypeError, r"damping must be a positive number, 'auto' or an instance of npl\.Damping"),
    ({"reduction": "none"}, ValueError, r"reduction must be one of 'mean', 'sum'; got 'none'"),
    ({"feature_dims": "1"}, TypeError, r"feature_dims must be None, an integer or a sequence of integers; got '1'"),
    ({"feature_dims": []}, ValueError, r"feature_dims must name at least one dimension"),
    ({"on_nonfinite": "skip"}, ValueError, r"on_nonfinite must be one of 'keep', 'raise'; got 'skip'"),
]


@pytest.mark.parametrize(("options", "kind", "match"), ARGUMENTS, ids=lambda v: str(v)[:40])
def test_wrong_arguments_fail_at_construction(options: dict[str, Any], kind: type[Exception], match: str) -> None:
    for make in (
        lambda: npl.LossHook(**options),
        lambda: npl.newton_loss(F.cross_entropy, **options),
        lambda: npl.newton_step(F.cross_entropy, Y, T, **options),
    ):
        with pytest.raises(kind, match=match) as caught:
            make()
        assert isinstance(caught.value, npl.NewtonPluginError)


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        (lambda: npl.AutoDamping(ratio=0), ValueError, r"ratio must be positive and finite; got 0"),
        (lambda: npl.AutoDamping(decay=1.0), ValueError, r"decay must be in \[0, 1\)"),
        (lambda: npl.AutoDamping(growth=0.5), ValueError, r"growth must be in \[1, inf\); got 0.5"),
        (lambda: npl.AutoDamping(floor=2), ValueError, r"floor must be in \[0, 1\); got 2"),
        (lambda: npl.AutoDamping(own=-1), ValueError, r"own must be in \[0, inf\); got -1"),
        (lambda: npl.AutoDamping(decay="slow"), TypeError, r"decay must be a number in \[0, 1\); got 'slow'"),
        (lambda: npl.SoftNormalization(c=-1), ValueError, r"c must be positive and finite; got -1"),
        (lambda: npl.LossHook(boundary=3), TypeError, r"boundary must be a name or a list of names; got 3"),
        (lambda: npl.LossHook(boundary=[]), ValueError, r"boundary must be 'auto' or name at least one part"),
        (lambda: npl.LossHook(boundary=["auto", "head"]), ValueError, r"boundary='auto' stands alone"),
        (lambda: npl.LossHook(boundary="hed", module=nn.Linear(2, 2)), ValueError, r"boundary='hed' names neither"),
        (lambda: npl.newton_loss(3), TypeError, r"loss_fn must be callable; got int"),
        (
            lambda: npl.newton_loss(F.mse_loss, outputs=1.5),
            TypeError,
            r"outputs must be a position, an argument",
        ),
        (lambda: npl.newton_loss(F.mse_loss, outputs=-1), ValueError, r"outputs must count from 0; got -1"),
        (lambda: npl.newton_loss(F.mse_loss, outputs=[]), ValueError, r"outputs must name at least one argument"),
        (lambda: npl.quadratic_surrogate(Y, Y[:2]), ValueError, r"outputs and target must have the same shape"),
        (lambda: npl.quadratic_surrogate(Y, Y, reduction="none"), ValueError, r"reduction must be one of"),
        (lambda: npl.quadratic_surrogate(Y.long(), Y), TypeError, r"outputs must have a floating-point dtype"),
        (lambda: npl.newton_step(F.mse_loss, [1.0], Y), TypeError, r"outputs must be a torch.Tensor; got list"),
        (lambda: npl.newton_step(F.mse_loss, Y.sum(), Y), ValueError, r"outputs must have a batch dimension first"),
        (
            lambda: npl.newton_step(F.cross_entropy, Y, T, feature_dims=2),
            ValueError,
            r"feature_dims must name diff",
        ),
        (
            lambda: npl.newton_step(lambda y: y.square(), Y),
            ValueError,
            r"one number or one for each of the 4 samples; got shape \(4, 3\)",
        ),
        (lambda: npl.newton_step(lambda y: y.detach().sum(), Y), RuntimeError, r"does not depend on outputs"),
        (
            lambda: npl.newton_step(info_nce, Y, T, curvature="hessian"),
            RuntimeError,
            r"the loss couples the samples of a batch, so .* Use curvature='fisher' or 'norm'",
        ),
        (lambda: npl.newton_step(F.cross_entropy, Y * torch.nan, T), RuntimeError, r"not finite in 4 of 4 samples"),
        (
            lambda: npl.newton_step(F.cross_entropy, Y, T, damping=lambda: None),
            TypeError,
            r"damping must be a positive number",
        ),
    ],
)
def test_wrong_input_is_named(make: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        make()
    assert isinstance(caught.value, npl.NewtonPluginError)


def test_singular_curvature_is_an_error_where_it_is_asked_for() -> None:
    class Nothing(npl.Damping):
        def value(self, scale: Tensor) -> Tensor:
            return torch.zeros_like(scale)

    with pytest.raises(npl.SingularCurvatureError, match=r"could not be inverted with damping 0"):
        npl.newton_step(lambda y: y[:, 0].square().mean(), Y, damping=Nothing())
    y = Y.clone().requires_grad_()
    loss = npl.LossHook(damping=Nothing())((y * 1)[:, 0].square().mean())
    loss.backward()
    assert bool(torch.isfinite(y.grad).all()), "in training the plain gradient stays, never a silent NaN"


def test_hessian_too_large_names_the_bytes() -> None:
    def loss(y: torch.Tensor) -> torch.Tensor:
        return y.cosh().sum(-1).mean()

    with pytest.raises(npl.OutputsTooLargeError, match=r"'block' .* 20000 features .* dense C of 3.0 GiB.*'diagonal'"):
        npl.newton_step(loss, torch.zeros(2, 20000), curvature="hessian", structure="block")
    with pytest.raises(npl.OutputsTooLargeError, match=r"'per_sample'.* spaces of 8 products of 2.5 GiB.*products"):
        npl.newton_step(loss, torch.zeros(1200, 20000), curvature="hessian", structure="per_sample")


HOOK_CALLS = [
    (lambda hook: hook(3.0), TypeError, r"loss must be a torch.Tensor; got float"),
    (lambda hook: hook(nn.Linear(3, 2)(Y.float())), ValueError, r"loss must be one number; got shape \(4, 2\)"),
    (lambda hook: hook(torch.ones(())), RuntimeError, r"loss has no autograd graph"),
    (
        lambda hook: hook(sum(p.square().sum() for p in nn.Linear(3, 2).parameters())),
        RuntimeError,
        r"boundary='auto' found no outputs under the loss .* Seen from the loss: Add, .*Pow.*\. Name the submodule",
    ),
]


@pytest.mark.parametrize(("call", "kind", "match"), HOOK_CALLS)
def test_hook_says_what_it_saw(call: Any, kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        call(npl.LossHook())
    assert isinstance(caught.value, npl.NewtonPluginError)


def test_named_boundaries_that_never_fire() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with pytest.raises(npl.ArgumentError, match=r"LossHook\(\.\.\., module=model\)"):
        npl.LossHook(boundary="1")(model(Y.float()).sum())
    hook = npl.LossHook(boundary="1", module=model)
    with pytest.raises(npl.NoBoundaryError, match=r"nothing recorded: the named part was not called"):
        hook(model[0](Y.float()).square().mean())
    hook = npl.LossHook(boundary="1", module=model)
    model(Y.float())
    with pytest.raises(npl.NoBoundaryError, match=r"recorded from '1', none of which the loss was computed from"):
        hook(model[0](Y.float()).square().mean())


def test_outputs_that_do_not_require_grad() -> None:
    loss = npl.newton_loss(F.cross_entropy)
    with pytest.raises(npl.NoGradientError, match=r"outputs=0 of cross_entropy does not require grad"):
        loss(Y, T)
    with torch.no_grad():
        assert torch.equal(loss(Y, T), F.cross_entropy(Y, T))
    assert torch.equal(loss.eval()(Y, T), F.cross_entropy(Y, T))


def test_wrapped_losses_say_what_is_wrong_with_a_call() -> None:
    y = Y.clone().requires_grad_()
    with pytest.raises(npl.ArgumentTypeError, match=r"outputs=1 of two must be a torch.Tensor; got int"):
        npl.newton_loss(two, outputs=1)(y, 3)
    with pytest.raises(npl.ArgumentError, match=r"outputs='logits' names no argument in this call of two"):
        npl.newton_loss(two, outputs="logits")(y, y)
    with pytest.raises(npl.NoBoundaryError, match=r"two does not depend on outputs='1'"):
        npl.newton_loss(two, outputs=1)(y, Y.clone().requires_grad_())
    with pytest.raises(npl.NoGradientError, match=r"returned a value without an autograd graph"):
        npl.newton_loss(lambda a: a.detach().sum())(y)


def two(a: Tensor, b: Any) -> Tensor:
    """Uses its first argument only."""
    return a.square().sum(-1).mean()
