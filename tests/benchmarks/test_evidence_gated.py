"""The dense twin of the gated rule is the package's step, on the live graph of an ordinary training."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from benchmarks.evidence.problems.registry import problems
from benchmarks.evidence.rules.gated import Gate, Gated, Size
from benchmarks.evidence.rules.rule import Batch
from benchmarks.evidence.training.arms import ARMS
from benchmarks.evidence.training.runs import Run
from benchmarks.evidence.training.train import Trainer
from torch import Tensor, nn

import newton_plugin as npl

STEPS = 50


def _labels(x: Tensor) -> Tensor:
    """A third of them wrong, so that the gate opens."""
    return torch.where(torch.rand(len(x)) < 0.67, x[:, :4].argmax(1), torch.randint(4, (len(x),)))


def _easy_but_for_a_tenth(x: Tensor) -> Tensor:
    """Two classes with a wide margin between them, which is put in; and a rare third one."""
    labels = (x[:, 0] > 0).long()
    x[:, 0] += 2 * x[:, 0].sign()
    return labels.masked_fill(x[:, 1] > 1.2, 2)


def _unused(*_: object) -> Tensor:
    raise AssertionError


@pytest.mark.parametrize(
    ("gate", "size", "most"),
    [
        ("conflict", "signal", 2.0),
        ("conflict", "newton", math.inf),
        ("conflict", "norm", 1.0),
        ("conflict", "plain", 2.0),
        (0.0, "signal", 2.0),
        (0.5, "norm", math.inf),
        (1.0, "newton", 2.0),
    ],
)
def test_the_twin_is_the_packages_step(gate: Gate, size: Size, most: float) -> None:
    opened, _ = _compared(gate, size, most, _labels)
    if gate == "conflict":
        assert max(opened) > 0.2  # else the test says little


def test_the_bound_is_lifted_as_the_twin_lifts_it() -> None:
    _, lifted = _compared("conflict", "signal", 2.0, _easy_but_for_a_tenth)
    assert max(lifted) > 0.2


def _compared(gate: Gate, size: Size, most: float, labels_of: Callable[[Tensor], Tensor]) -> tuple[list[float], ...]:
    """Both on the same training; p of its steps, and how far the bound was lifted."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4, bias=False)).double()
    rule = npl.GatedFisher(gate=gate, size=size, most=most)  # type: ignore[arg-type]
    hook, twin = npl.LossHook(curvature=rule), Gated(gate, size, most)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    opened, lifted = [], []
    for _ in range(STEPS):
        x = torch.randn(16, 6, dtype=torch.float64)
        labels = labels_of(x)
        inputs = net[:2](x).detach()
        y = net(x)
        y.retain_grad()
        at = y.detach().requires_grad_()
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(at, labels, reduction="sum"), at)
        v = torch.einsum("nk,nd->nkd", g, inputs).flatten(1)
        one = torch.zeros(1)
        want = twin.step(Batch(g[None], one, one, _unused, _unused, lambda v=v: v[None]))[0]
        optimizer.zero_grad()
        hook(nn.functional.cross_entropy(y, labels)).backward()
        assert y.grad is not None
        torch.testing.assert_close(y.grad * 16, want, rtol=1e-10, atol=1e-14)
        opened.append(float(twin.opened))
        lifted.append(float(twin.lifted))
        optimizer.step()
    if gate == "conflict":
        assert hook.diagnostics()["gate"] == pytest.approx(opened[-1], abs=1e-12)
        assert hook.diagnostics()["lifted"] == pytest.approx(lifted[-1], abs=1e-12)
    return opened, lifted


@pytest.mark.parametrize("name", ["wrong_lists", "wrong_labels", "for_l2", "ctc_4"])
def test_a_replica_is_the_run_that_the_package_would_train(name: str) -> None:
    problem = problems()[name]
    sharp = problem.sharpnesses[0] if problem.sharpnesses else None
    run = Run(name, "gated", 1e-2, None, sharp, 25, problem.batch, 1000, "tune")
    trainer = Trainer(problem, ARMS["gated"], [run])
    torch.manual_seed(run.seed)
    network = problem.network()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    rows = problem.loss(sharp, [run.seed], False)
    loss = npl.newton_loss(lambda outputs, targets: rows(outputs, targets).mean(), structure="gated")
    for _, (x, target) in zip(trainer.steps(), problem.batches([run.seed], run.batch, run.steps), strict=True):
        optimizer.zero_grad()
        loss(network(x[0]), target[0]).backward()
        optimizer.step()
        schedule.step()
    assert trainer.mean.candidate is not None
    twin = trainer.mean.candidate.rule
    assert isinstance(twin, Gated)
    assert float(twin.share) == pytest.approx(loss.diagnostics()["signal"], rel=1e-3)
    assert float(twin.opened) == pytest.approx(loss.diagnostics()["gate"], abs=1e-3)
    for ours, theirs in zip(trainer.networks.parameters, network.parameters(), strict=True):
        if theirs.numel() > 1:  # the last bias moves no order: Adam makes steps of its rounding
            torch.testing.assert_close(ours[0], theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("gate", ["inverted", "random"])
def test_controls_are_something_else(gate: Gate) -> None:
    torch.manual_seed(0)
    g = torch.randn(1, 8, 3, dtype=torch.float64) * torch.rand(1, 8, 1, dtype=torch.float64)
    one = torch.zeros(1)
    batch = Batch(g, one, one, _unused, _unused, lambda: g)
    control, rule = Gated(gate), Gated()
    for _ in range(12):
        a, b = control.step(batch), rule.step(batch)
    if gate == "inverted":
        assert not torch.allclose(a, b)
        assert float(control.opened) == 1 - float(rule.opened)
    else:
        assert float(control.opened) == 0  # one batch again and again, at random: no sign that stays
