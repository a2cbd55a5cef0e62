"""check_loss on flawed losses, on unusual arguments, and on wrong ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.testing.flawed import CASES, WEIGHT, T, Y
from tests.testing.losses import NewStyleCube, info_nce
from torch import Tensor, nn

import newton_plugin as npl
import newton_plugin.testing._check
from newton_plugin.testing import LossReport, check_loss
from newton_plugin.testing._reasons import in_plain_words


def best_of(report: LossReport) -> str | None:
    """The Hessian where it is available, else Fisher."""
    assert report.available in ((), ("fisher", "norm"), ("fisher", "norm", "hessian"))
    assert bool(report.without_hessian) == ("hessian" not in report.available)
    return "hessian" if "hessian" in report.available else next(iter(report.available), None)


@pytest.mark.parametrize("name", list(CASES))
def test_what_is_found(name: str) -> None:
    loss, outputs, expected, curvature = CASES[name]
    report = check_loss(loss, outputs)
    for which, (status, verdict, words) in expected.items():
        finding = report.findings[which]
        assert (finding.status, finding.verdict) == (status, verdict), which
        assert words in finding.words
    assert best_of(report) == curvature
    assert all(title in str(report) for title in ("Hessian, double backward", "torch.func vmap"))


def test_what_is_available_in_words() -> None:
    square = check_loss(F.mse_loss, Y, Y + 1)
    assert "Available: curvature='fisher', 'norm', 'hessian'." in str(square)
    assert "closed form" in square.cost.words
    half = check_loss(CASES["half a Hessian"][0], Y)
    assert half.asked == "hessian"
    assert "Not 'hessian': it is wrong. If it is asked for, it is taken all the same, and is wrong." in flowing(half)
    assert "Available: no curvature." in str(check_loss(lambda y: 3.0, Y))


def flowing(report: LossReport) -> str:
    return " ".join(str(report).split())


def test_numbers_are_what_was_measured() -> None:
    """2 t_k for a weighted square: eigenvalues, value and (wrong) gradient by hand."""
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    found = check_loss(lambda y, w: (w * y.square()).sum(-1).mean(), Y, weights)
    assert found.definiteness.number == pytest.approx(-4)
    assert "from -4 to 6, negative ones in 5 of 5 samples; the mean's from -4 to 6" in found.definiteness.words
    assert found.evaluation.number == pytest.approx(float((weights * Y.square()).sum(-1).mean()))
    assert (found.samples, found.features) == (5, 3)
    # A loss whose reported gradient is 3/4 of the true one differs by a quarter of it.
    tilted = check_loss(lambda y: (0.75 * y + 0.25 * y.detach()).sin().sum(-1).mean(), Y)
    assert 0.05 < (tilted.gradient_differences.number or 0) < 1
    # Errors of float32 are of its size.
    assert 1e-9 < (check_loss(torch.nn.functional.softplus, Y[:, 0]).precision.number or 0) < 1e-6


def test_sums_modules_keywords_and_feature_dims() -> None:
    total = check_loss(lambda y: y.square().sum(), Y, reduction="sum")
    assert total.definiteness.number == pytest.approx(2)
    assert total.evaluation.number == pytest.approx(float(Y.square().sum()))
    named = check_loss(F.cross_entropy, Y.float(), loss_kwargs={"target": T})
    assert named.name == "cross_entropy"
    assert "by keyword" in named.func_per_sample.words
    module = check_loss(nn.CrossEntropyLoss(weight=WEIGHT), Y.float(), T)
    assert module.name == "CrossEntropyLoss"
    assert module.precision.status == "ok", "a module's buffers follow the outputs' dtype"
    pixels = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    classes = torch.zeros(2, 4, dtype=torch.long)
    dense = check_loss(F.cross_entropy, pixels, classes, feature_dims=1)
    assert (dense.samples, dense.features) == (8, 3)
    assert dense.coupling.verdict == "independent"
    assert dense.definiteness.verdict == "positive semidefinite"
    assert "several samples of one row" in dense.func_per_sample.words
    # Three rows of three scores each are one sample; seen as nine, their losses are coupled.
    listed = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))

    def spread(y: Tensor) -> Tensor:
        return y.reshape(2, 9).var(-1).mean()

    assert check_loss(spread, listed).coupling.verdict == "coupled"
    assert check_loss(lambda y: spread(y.reshape(6, 3)), listed.reshape(2, 9)).coupling.verdict == "independent"


def test_a_pair_of_coupled_samples_among_many_is_seen() -> None:
    """Only samples 0 and 1 of 40 are coupled."""

    def loss(y: Tensor) -> Tensor:
        return y.cosh().sum(-1).mean() + (y[0] * y[1]).sum() / len(y)

    y = torch.randn(40, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert check_loss(loss, y).coupling.verdict == "coupled"
    assert (check_loss(info_nce, Y).coupling.number or 0) > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_checked_in_float64(dtype: torch.dtype) -> None:
    report = check_loss(F.cross_entropy, Y.to(dtype), T)
    assert report.gradient_differences.number is not None
    assert report.gradient_differences.number < 1e-6
    assert best_of(report) == "hessian"


def test_an_autograd_function_with_rules_works_everywhere() -> None:
    report = check_loss(lambda y: NewStyleCube.apply(y).sum(-1).mean(), Y)
    assert report.func_gradient.status == "ok"
    assert report.func_hessian.status == "note"
    assert "without forward-mode" in report.func_hessian.words
    assert report.func_hessian.cause.startswith("You must implement the jvp function")


UNKNOWN = "something nobody has seen" + " and on" * 40


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("trying to differentiate twice a function that was marked with @once_differentiable", "marked once_diff"),
        ("Batching rule not implemented; it does not have vmap support", "without a rule for vmap"),
        ("expected scalar type Double but found Float", "a dtype of their own"),
        ("Can't call numpy() on Tensor that requires grad. Use tensor.detach()", "leaves torch for numpy"),
        ("Cannot access data pointer of Tensor that doesn't have storage", "leaves torch for numpy"),
        ("", "RuntimeError: RuntimeError"),
        (UNKNOWN + "\nand its traceback", "RuntimeError: something nobody has seen"),
    ],
)
def test_exceptions_in_plain_words(message: str, words: str) -> None:
    said, _ = in_plain_words(RuntimeError(message))
    assert words in said
    assert len(said) < 200
    assert "traceback" not in said


@pytest.mark.parametrize(
    ("call", "kind", "match"),
    [
        (lambda: check_loss(3, Y), npl.ArgumentTypeError, r"loss_fn must be callable; got int"),  # type: ignore[arg-type]
        (lambda: check_loss(F.mse_loss, [1.0], Y), npl.ArgumentTypeError, r"outputs must be a torch.Tensor; got list"),  # type: ignore[arg-type]
        (lambda: check_loss(F.mse_loss, T, T), npl.ArgumentTypeError, r"outputs must have a floating-point dtype"),
        (lambda: check_loss(F.mse_loss, Y.sum(), Y), npl.ShapeError, r"outputs must have a batch dimension first"),
        (lambda: check_loss(F.mse_loss, Y[:0], Y[:0]), npl.ShapeError, r"at least one sample .*; got shape \(0, 3\)"),
        (lambda: check_loss(F.mse_loss, Y, Y, feature_dims=5), npl.ShapeError, r"feature_dims must name different"),
        (lambda: check_loss(F.mse_loss, Y / 0, Y), npl.NonFiniteError, r"outputs must be finite; got NaN or infinite"),
        (lambda: check_loss(F.mse_loss, Y, Y, reduction="none"), npl.ArgumentError, r"reduction must be one of"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(call: Callable[[], LossReport], kind: type[Exception], match: str) -> None:
    with pytest.raises(kind, match=match):
        call()


def test_many_samples_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton_plugin.testing._check, "_MOST_ENTRIES", 5 * 3 * 3 - 1)
    report = check_loss(F.cross_entropy, Y, T)
    assert report.definiteness.words == report.cost.words == "pass fewer samples to look at their Hessians"
    assert best_of(report) == "hessian"


def test_a_module_that_cannot_be_copied_is_used_as_it_is() -> None:
    """It holds a tensor with a graph. The module itself is used, so its dtype must not be changed."""
    loss = nn.CrossEntropyLoss(weight=WEIGHT)
    loss.held = torch.ones(2, requires_grad=True) * 2
    report = check_loss(loss, Y.float(), T)
    assert best_of(report) == "hessian"
    assert report.precision.verdict == "one dtype only"
    assert loss.weight is not None
    assert loss.weight.dtype == torch.float32


def test_a_wrapped_loss_is_looked_at_unwrapped() -> None:
    """With the wrapping, every gradient would be a Newton step, and would be found wrong."""
    report = check_loss(npl.newton_loss(F.cross_entropy, damping=1e-3), Y, T)
    assert report.gradient.verdict == "exact"
    assert report.name == "cross_entropy"


def test_under_no_grad_too() -> None:
    with torch.no_grad():
        report = check_loss(F.cross_entropy, Y, T)
    assert best_of(report) == "hessian"
    assert math.isfinite(report.hessian_differences.number or math.nan)
