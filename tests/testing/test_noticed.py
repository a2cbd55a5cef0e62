"""What check_loss notices of a batch: where its samples lie, which count, who decides it; and what it recommends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.testing.flawed import CASES
from torch import Tensor

import newton_plugin as npl
from newton_plugin.testing import check_loss
from newton_plugin.testing._advice import Evidence, advise

G = torch.Generator().manual_seed(0)
Y = torch.randn(20, 3, generator=G, dtype=torch.float64)
T = torch.randint(3, (20,), generator=G)


def rows_along(axis: int) -> Any:
    """Cross-entropy of outputs whose samples lie along an axis and whose classes lie along the last of the others."""
    return lambda y, t: F.cross_entropy(y.movedim(axis, 0).flatten(1), t)


@pytest.mark.parametrize(
    ("outputs", "axis"),
    [(Y.T.contiguous(), 1), (Y[:6].reshape(1, 6, 3).repeat(2, 1, 1), 1), (Y[:6].reshape(3, 2, 3), 2)],
)
def test_samples_on_another_axis(outputs: Tensor, axis: int) -> None:
    target = torch.zeros(outputs.shape[axis], dtype=torch.long)
    found = check_loss(rows_along(axis), outputs + 0.1 * torch.randn(outputs.shape, generator=G), target).coupling
    assert (found.status, found.verdict) == ("note", "coupled")
    assert f"Along dimension {axis} they are independent" in found.words
    assert f"outputs.movedim({axis}, 0)" in found.remedy
    told = tuple(d for d in range(outputs.ndim) if d != axis)
    assert check_loss(rows_along(axis), outputs, target, feature_dims=told).coupling.verdict == "independent"


def test_a_loss_that_couples_everything_names_no_axis() -> None:
    found = check_loss(lambda y: y.flatten().logsumexp(0), Y[:5]).coupling
    assert found.verdict == "coupled"
    assert "Along dimension" not in found.words
    assert "name feature_dims" in found.remedy


def test_rows_that_are_ignored_and_rows_that_are_flat_here() -> None:
    some = T.clone()
    some[[2, 5, 7]] = -100
    ignored = check_loss(F.cross_entropy, Y, some).ignored
    assert (ignored.status, ignored.verdict, ignored.number) == ("note", "some ignored", 3)
    assert "17 of 20" in ignored.words
    hinge = check_loss(lambda y: (y.sum(-1) - 0.2).clamp_min(0).mean(), Y)
    flat = int((Y.sum(-1) <= 0.2).sum())
    assert (hinge.ignored.verdict, hinge.ignored.number) == ("some flat", flat)
    assert check_loss(F.cross_entropy, Y, T).ignored.verdict == "all"


def test_complex_outputs_are_pairs_of_real_ones() -> None:
    z = torch.view_as_complex(Y[:, :2].contiguous()).reshape(20, 1)
    report = check_loss(lambda z, w: (w * z.abs().square()).mean(), z, torch.tensor(3.0))
    assert (report.outputs.status, report.outputs.verdict, report.features) == ("note", "complex", 2)
    assert "torch.view_as_real(outputs)" in report.outputs.remedy
    assert report.gradient_differences.verdict == "agrees"
    assert report.definiteness.number == pytest.approx(6)
    assert check_loss(F.mse_loss, Y, Y + 1).outputs.verdict == "real"


def test_a_sum_of_torchs_own_is_noticed_where_the_target_is_held() -> None:
    def held(y: Tensor) -> Tensor:
        return F.cross_entropy(y, T, reduction="sum")

    found = check_loss(held, Y).reduction
    assert (found.status, found.verdict) == ("note", "sum")
    assert found.remedy == "give reduction='sum' to newton_plugin"
    assert check_loss(held, Y, reduction="sum").reduction.status == "ok"


def test_tail_and_spread_are_those_of_the_page() -> None:
    """docs/when-it-helps.md, "Look first"."""
    g = npl.newton_step(F.cross_entropy, Y, T, curvature="norm").gradient.flatten(1).double()
    squared = g.square().sum(1).sort(descending=True).values
    values = torch.linalg.eigvalsh(g.mT @ g / len(g))
    report = check_loss(F.cross_entropy, Y, T)
    assert report.tail.number == pytest.approx(float(squared[: len(g) // 10].sum() / squared.sum()), rel=1e-12)
    assert report.spread.number == pytest.approx(
        float(values[-1] / values[values > 1e-9 * values[-1]].mean()), rel=1e-12
    )
    assert check_loss(F.mse_loss, Y[:9], Y[:9] + 1).tail.status == "skipped"
    few = check_loss(lambda y: (y[0].square().sum() + 1e-3 * y.square().sum()) / len(y), Y).tail
    assert (few.status, round(few.number or 0)) == ("note", 1)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("straight-through", "your gradient is wrong by "),
        ("detached", "the gradient is missing (its value does not depend on the outputs"),
        ("nan gradient", "the gradient is non-finite (NaN or infinite in 5 of 5"),
        ("nan value", "the loss gives no number here (the loss is nan at these outputs)"),
        ("wrong in float32", "in float32 its derivatives are wrong by "),
    ],
)
def test_a_fault_of_the_loss_leads_the_report(name: str, words: str) -> None:
    report = check_loss(*CASES[name][:2])
    assert report.advice.take == "mend"
    lines = str(report).splitlines()
    led = " ".join(lines[2 : lines.index("", 2)])
    assert led.startswith(words[0].upper() + words[1:])
    assert led.endswith("mend that first.")
    assert "Recommended: " + words in " ".join(str(report).split())


def test_the_size_of_a_wrong_gradient_is_said() -> None:
    """Of one in place of the true zero, everything is wrong."""
    report = check_loss(lambda y: (y - y.detach()).sum(-1).mean() + 3, Y)
    assert report.gradient_differences.number == pytest.approx(1, abs=0.01)
    assert "Your gradient is wrong by 100 %" in str(report)


def test_a_sound_loss_has_no_headline() -> None:
    lines = str(check_loss(F.cross_entropy, Y, T)).splitlines()
    assert lines[2].startswith("outputs ")
    assert "Recommended: the default, LossHook() or NewtonLosses(), because" in "\n".join(lines)
    assert "Use curvature" not in "\n".join(lines)


SOUND = {"samples": 32, "tail": 0.3, "tail_before": 0.3, "spread": 1.2, "gate": 0.0, "contradiction": -0.2}


@pytest.mark.parametrize(
    ("known", "take", "because"),
    [
        ({}, "default", "no Hessian and no matrix did better"),
        ({"tail": 0.8}, "default", "a tenth of them holds 80 %"),
        ({"tail": 0.46}, "default", "up from 30 %"),
        ({"spread": 12.0}, "plain", "spread 12.0"),
        ({"spread": 12.0, "gate": 0.9, "contradiction": 0.4}, "gated", "contradicts its body (by 0.40)"),
        ({"gate": 0.9, "contradiction": 0.4}, "default", "contradicts its body"),
        ({"gate": 0.9, "contradiction": 0.4, "tail": 0.12, "tail_before": 0.11}, "default", "no Hessian and no matrix"),
        ({"gate": 0.9, "contradiction": 0.4, "memoryless": True}, "gated", "without longer steps"),
        ({"memoryless": True}, "gated", "48 to 87 points"),
        ({"random": True}, "plain", "draws random numbers"),
        ({"samples": 4}, "plain", "a batch of 4 samples"),
        ({"samples": 4, "fault": "it is wrong"}, "mend", "it is wrong"),
        ({name: math.nan for name in SOUND if name != "samples"}, "default", "no Hessian and no matrix"),
    ],
    ids=str,
)
def test_the_first_rule_that_applies_decides(known: dict[str, Any], take: str, because: str) -> None:
    advice = advise(Evidence(**{**SOUND, **known}))
    assert advice.take == take
    assert because in advice.because
    assert because in str(advice)
