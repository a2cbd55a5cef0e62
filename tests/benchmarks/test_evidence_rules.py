"""The candidates against their formulas, and the measurements of signal and noise against closed forms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.evidence.problems.registry import problems
from benchmarks.evidence.rules.all_rules import RULES
from benchmarks.evidence.rules.of_size import GeometricMean as Candidate
from benchmarks.evidence.rules.our_rule import GeometricMean
from benchmarks.evidence.rules.rule import Batch
from benchmarks.evidence.training import mechanism
from benchmarks.evidence.training.arms import CANDIDATES
from benchmarks.evidence.training.timing import append_times, read_times
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import newton_plugin as npl

DAMPING = npl.AutoDamping()


def _gradients(seed: int, steps: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 6, 3, generator=generator, dtype=torch.float64) for _ in range(steps)]


def _batch(g: Tensor) -> Batch:
    """Of a quadratic loss |y|^2 / 2 at outputs y = g."""
    eye = torch.eye(g.shape[-1], dtype=g.dtype).expand(*g.shape, -1)
    return Batch(g, g.square().sum(-1) / 2, g, lambda y: y.square().sum(-1) / 2, lambda: eye)


@pytest.mark.parametrize("name", RULES)
def test_replicas_do_not_meet_and_steps_are_descent_directions(name: str) -> None:
    together, first = RULES[name](), RULES[name]()
    for g in _gradients(0, 4):
        step = together.step(_batch(g))
        torch.testing.assert_close(step[:1], first.step(_batch(g[:1])))
        assert ((step * g).sum(-1) > 0).all()


def test_our_rule_is_the_candidate() -> None:
    """While no batch is ten times as large as those before it."""
    ours, theirs = [GeometricMean(), GeometricMean()], Candidate(0.1)
    for g in _gradients(1, 5):
        expected = theirs.step(_batch(g))
        for r in range(2):
            torch.testing.assert_close(ours[r].step(g[r], None, DAMPING).step, expected[r])


def test_our_rule_lies_between_the_sample_and_the_batch() -> None:
    (g,) = _gradients(2)
    squared, s = g[0].square().sum(-1, keepdim=True), g[0].square().sum(-1).mean()
    step = GeometricMean(c=1e-9).step(g[0], None, DAMPING).step
    torch.testing.assert_close(step, g[0] / (squared.sqrt() * s.sqrt()), rtol=1e-6, atol=0)
    many = GeometricMean(c=1e9).step(g[0], None, DAMPING).step * 1e9**0.5
    torch.testing.assert_close(many, g[0] / s, rtol=1e-6, atol=0)  # the isotropic Fisher step


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.floats(-12, 12), st.integers(0, 10))
def test_our_rule_does_not_ask_for_the_unit_of_the_loss(exponent: float, seed: int) -> None:
    scale, a, b = 10.0**exponent, GeometricMean(), GeometricMean()
    for g in _gradients(seed, 3):
        plain, scaled = a.step(g[0], None, DAMPING).step, b.step(scale * g[0], None, DAMPING).step
        torch.testing.assert_close(scaled * scale, plain)


def test_one_exploded_batch_does_not_silence_the_next() -> None:
    rule, (g,) = GeometricMean(), _gradients(3)
    before = rule.step(g[0], None, DAMPING).step
    exploded = rule.step(1e6 * g[0], None, DAMPING).step
    after = rule.step(g[0], None, DAMPING).step
    assert exploded.norm() < 10 * before.norm()
    assert after.norm() > before.norm() / 10
    bad = torch.full_like(g[0], float("nan"))
    assert not rule.step(bad, None, DAMPING).finiteness.curvature
    torch.testing.assert_close(rule.step(g[0], None, DAMPING).step.isfinite().all(), torch.tensor(True))


def test_vanishing_gradients_give_no_unbounded_steps() -> None:
    rule, (g,) = GeometricMean(), _gradients(4)
    first = rule.step(g[0], None, DAMPING).step.norm()
    for _ in range(200):
        step = rule.step(1e-12 * g[0], None, DAMPING).step
    assert step.norm() < 1e4 * first
    assert torch.equal(GeometricMean().step(0 * g[0], None, DAMPING).step, torch.zeros(6, 3, dtype=torch.float64))


def test_our_rule_is_a_curvature_of_the_package() -> None:
    loss_fn = npl.NewtonLoss(torch.nn.functional.mse_loss, curvature=GeometricMean())
    y = torch.randn(4, 2, requires_grad=True)
    loss_fn(y, torch.zeros(4, 2)).backward()
    g = y.detach().double()  # the gradient of a sample's mean over two features
    expected = GeometricMean().step(g, None, DAMPING).step / 4
    torch.testing.assert_close(y.grad, expected.float())


def test_signal_to_noise_of_known_noise() -> None:
    """Gradients of a linear layer: batches of one sample, signal 3 and noise of variance 4 in each of 2 numbers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(2, requires_grad=True)
    steps = 3 + 2 * torch.randn(4000, 1, 2, generator=generator)
    outputs = [weight.unsqueeze(0) * 1.0 for _ in steps]
    assert mechanism._signal_to_noise(outputs, steps, [weight]) == pytest.approx(2 * 9 / (2 * 4), rel=0.05)


def test_looking_at_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanism, "BATCHES", 6)
    problem = replace(problems()["fenchel_young_3"], steps=10)  # type: ignore[type-var]
    mechanism.append_mechanism(tmp_path / "m.jsonl", problem)
    rows = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [row["share"] for row in rows] == [0.1, 0.5, 1.0]
    for row in rows:
        assert row["spread"] >= 1
        assert 0.1 <= row["tail"] <= 1
        assert row["signal_largest"] > row["signal_smallest"]  # three samples of noise


def test_steps_are_timed(tmp_path: Path) -> None:
    times = append_times(tmp_path / "t.jsonl", problems()["linear_sgd"], 3)
    assert read_times(tmp_path / "t.jsonl") == {"linear_sgd": times}
    assert set(times) >= {"plain, stable", "clipped", "normalised", "our rule"}
    assert all(ms > 0 for ms in times.values())


def test_textbook_candidates_train_on_the_textbook_loss() -> None:
    assert CANDIDATES["textbook, our rule"].textbook
    assert not CANDIDATES["soft norm, whitened"].textbook
