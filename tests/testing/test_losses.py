"""check_loss on nineteen real-life losses, against what each of them is and against brute force."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.testing.losses import LOSSES, Row
from tests.twins import relative_error
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin.testing import LossReport, check_loss

NAMES = list(LOSSES)


@functools.cache
def report(name: str) -> LossReport:
    row = LOSSES[name]
    return check_loss(row.loss, row.outputs, *row.args)


def seeded(row: Row) -> Callable[[Tensor], Tensor]:
    """The loss as a function of the outputs, always with the same random numbers, on a copy it may change."""

    def loss(y: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return row.loss(y.clone(), *row.args)

    return loss


def gradient_at(row: Row, y: Tensor) -> Tensor:
    leaf = y.clone().requires_grad_()
    return torch.autograd.grad(seeded(row)(leaf), leaf)[0]


def brute_force_hessian(row: Row) -> Tensor:
    """(N, m, N, m) of N times the loss, entry by entry from differences of the gradient."""
    y = row.outputs
    n, m, h = len(y), y[0].numel(), 1e-5
    columns = []
    for k in range(y.numel()):
        e = torch.zeros(y.numel(), dtype=y.dtype).index_fill(0, torch.tensor(k), h).view_as(y)
        columns.append((gradient_at(row, y + e) - gradient_at(row, y - e)).flatten() * (n / (2 * h)))
    return torch.stack(columns, 1).reshape(n, m, n, m)


def works(function: Callable[[], Any]) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            function()
        except Exception:
            return False
    return True


@pytest.mark.parametrize("name", NAMES)
def test_findings_are_what_the_loss_is(name: str) -> None:
    row, found = LOSSES[name], report(name)
    assert found.evaluation.number == pytest.approx(float(seeded(row)(row.outputs)), rel=1e-12)
    assert found.gradient.verdict == "exact"
    assert found.hessian.verdict == row.hessian
    assert found.determinism.verdict == ("random" if row.random else "deterministic")
    assert found.coupling.verdict == ("coupled" if row.coupled else "independent")
    verdict = {"": "not looked at", "indefinite": "indefinite"}.get(row.definite, f"positive {row.definite}")
    assert found.definiteness.verdict == verdict
    assert found.func_per_sample.ok == row.vmap
    assert found.available == (("fisher", "norm", "hessian") if row.curvature == "hessian" else ("fisher", "norm"))


@pytest.mark.parametrize("name", NAMES)
def test_findings_agree_with_brute_force(name: str) -> None:
    """Coupling, Hessian and eigenvalues, computed again from the (N m) x (N m) matrix of differences."""
    row, found = LOSSES[name], report(name)
    full = brute_force_hessian(row)
    n = len(row.outputs)
    blocks = torch.stack([full[i, :, i] for i in range(n)])
    rest = full.clone()
    for i in range(n):
        rest[i, :, i] = 0
    assert (float(rest.abs().max()) > 1e-6 * float(full.abs().max())) == row.coupled
    assert (float(full.abs().max()) < 1e-6) == (row.hessian == "zero")
    if row.definite:
        assert found.definiteness.number == pytest.approx(
            float(torch.linalg.eigvalsh(blocks).min()), abs=1e-6 * float(blocks.abs().max())
        )


@pytest.mark.parametrize("name", NAMES)
def test_torch_func_is_judged_by_calling_it(name: str) -> None:
    row, found = LOSSES[name], report(name)

    def loss(y: Tensor) -> Tensor:
        return row.loss(y, *row.args)

    y = row.outputs
    assert found.func_gradient.ok == works(lambda: torch.func.grad(loss)(y.clone()))
    forward = works(lambda: torch.func.hessian(loss)(y.clone()))
    backward = works(lambda: torch.func.jacrev(torch.func.jacrev(loss))(y.clone()))
    assert (found.func_hessian.status == "ok") == forward
    assert found.func_hessian.ok == (forward or backward)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_available_is_what_the_package_does(name: str) -> None:
    """One step with each curvature by newton_loss: the Hessian is another one than Fisher's where it is available."""
    row, found = LOSSES[name], report(name)

    def sent(curvature: Any) -> Tensor:
        leaf = row.outputs.clone().requires_grad_()
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(0)
            warnings.simplefilter("ignore")
            npl.newton_loss(row.loss, curvature=curvature, damping=0.1)(leaf.clone(), *row.args).backward()
        assert leaf.grad is not None
        return leaf.grad

    assert all(bool(torch.isfinite(sent(curvature)).all()) for curvature in found.available)
    if row.coupled:
        assert found.asked == "error"
        with pytest.raises(npl.BatchCoupledError):
            sent("hessian")
    elif "hessian" in found.available:
        assert found.asked == "hessian"
        assert relative_error(sent("hessian"), sent("fisher")) > 1e-3, "the two differ, so the test can fail"
    else:
        assert found.asked == "fisher"
        assert torch.allclose(sent("hessian"), sent("fisher"), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", NAMES)
def test_measured_numbers_are_sane(name: str) -> None:
    found = report(name)
    if found.determinism.verdict == "deterministic":
        assert found.precision.status == "ok"
        assert 0 <= (found.precision.number or 0) < 1e-5
    assert found.gradient_differences.status == "ok"
    if found.hessian.verdict == "exact":
        assert found.hessian_differences.status == "ok"
        assert 0.1 < (found.cost.number or math.nan) < 1000


@pytest.mark.parametrize("name", NAMES)
def test_no_traceback_reaches_the_author(name: str) -> None:
    """Plain words: nothing of what torch says about vmap levels, transforms or internals."""
    found = report(name)
    for finding in found.findings.values():
        shown = f"{finding.words} {finding.remedy}"
        assert "Traceback" not in shown
        assert "functorch" not in shown
        assert "Error" not in shown
        assert len(shown) < 420
        if finding.status == "fails":
            assert finding.remedy, "a failure says what to do"
    lines = str(found).splitlines()
    assert max(len(line) for line in lines) <= 110
    assert all(any(line.startswith(title) for line in lines) for title in ("gradient, autograd", "cost of a Hessian"))
    assert lines[-1].endswith(".")


def test_there_are_nineteen() -> None:
    assert len(LOSSES) == 19


def test_a_check_leaves_no_trace() -> None:
    """Outputs, buffers and random state are as before, for a loss that changes all three."""

    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, y: Tensor, t: Tensor) -> Tensor:
            t.add_(1)
            y.mul_(2)
            return (self.norm(y + torch.randn_like(y)) - t).square().sum(-1).mean()

    loss, y, t = Changing(), torch.arange(12.0).reshape(4, 3), torch.ones(4, 3)
    before = {k: v.clone() for k, v in loss.state_dict().items()}
    state = torch.get_rng_state()
    found = check_loss(loss, y, t)
    bound = check_loss(loss.forward, y, t)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(y, torch.arange(12.0).reshape(4, 3))
    assert torch.equal(t, torch.ones(4, 3))
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())
    assert found.gradient.ok
    assert found.coupling.verdict == bound.coupling.verdict == "coupled"


@pytest.mark.parametrize("told", ["mean", "sum"])
@pytest.mark.parametrize("is_a", ["mean", "sum", "neither"])
def test_a_reduction_that_was_not_told_is_noticed_also_where_the_sum_is_written_by_hand(is_a: str, told: Any) -> None:
    def loss(y: Tensor, t: Tensor) -> Tensor:
        each = (y - t).square().sum(-1)
        return {"mean": each.mean(), "sum": each.sum(), "neither": each.sum().sqrt()}[is_a]

    y, t = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    found = check_loss(loss, y, t, reduction=told).reduction
    assert found.verdict == is_a
    assert found.status == ("ok" if is_a == told else "note")
    assert found.remedy == ("" if is_a in ("neither", told) else f"give reduction={is_a!r} to newton_plugin")


def test_targets_that_the_loss_function_holds_are_asked_for() -> None:
    y, t = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    assert "pass its targets as arguments" in check_loss(lambda y: (y - t.to(y)).square().mean(), y).reduction.words
