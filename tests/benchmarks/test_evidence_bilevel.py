"""Noisy lists under learned weights: one run at a time, its lines in the form of the others."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.evidence import bilevel_lists
from benchmarks.evidence.bilevel_lists import BILEVEL, Training
from benchmarks.evidence.data.number_lists import NumberLists
from benchmarks.evidence.problems.registry import problems
from benchmarks.evidence.tables.write import write_tables
from benchmarks.evidence.training.arms import ARMS, BASELINE
from benchmarks.evidence.training.runs import Lines, Purpose, Run

import newton_plugin as npl

ARMS_SHOWN = bilevel_lists.SHOWN


def _training(
    name: str, arm: str, rate: float = 0.05, steps: int = 20, purpose: Purpose = "tune", seed: int = 0
) -> Training:
    problem = BILEVEL[name]
    return Training(problem, ARMS[arm], Run(name, arm, rate, None, 1.0, steps, 64, seed, purpose))


def test_problems_are_not_trained_by_the_stack() -> None:
    assert not set(BILEVEL) & set(problems())
    for problem in BILEVEL.values():
        assert set(ARMS) - set(problem.without) == set(ARMS_SHOWN)


def test_arms_see_the_same_lists_batches_and_first_weights() -> None:
    plain, ours = _training("noisy_weighted", BASELINE), _training("noisy_equal", "our rule")
    assert torch.equal(plain.images, ours.images)
    assert torch.equal(plain.ranks, ours.ranks)
    for a, b in zip(plain.network.parameters(), ours.network.parameters(), strict=True):
        assert torch.equal(a, b)
    for training in (plain, ours):
        training.step()
    assert torch.equal(plain.generator.get_state(), ours.generator.get_state())
    assert not torch.equal(plain.images, _training("noisy_equal", BASELINE, seed=1).images)


def test_about_a_third_is_wrong_and_the_clean_lists_are_others() -> None:
    training = _training("noisy_weighted", BASELINE)
    assert 0.2 < float(training.wrong.double().mean()) < 0.4
    assert training.clean_ranks.shape == (100, 5)
    ((_, ranks),) = NumberLists("train", 5, 1).draw(1, 400, 0)
    same = (training.ranks == ranks).all(-1)
    assert same[~training.wrong].all()
    assert not same[training.wrong].all()


@pytest.mark.parametrize("arm", [a for a in ARMS_SHOWN if a != BASELINE])
def test_the_lower_level_descends_the_packages_step(arm: str) -> None:
    """With weights of one, without decay: SGD on the surrogate moves the network as SGD with the hook does."""
    training = _training("noisy_equal", arm, rate=0.1)
    twin = _training("noisy_equal", arm, rate=0.1)
    curvature, damping = ARMS[arm].newton(None)  # type: ignore[misc]
    hook = npl.LossHook(curvature=curvature, damping=damping)
    batch = torch.randint(400, (64,), generator=twin.generator)
    loss = hook(25 * twin._mean(twin.network(twin.images[batch]), twin.ranks[batch]))
    (loss + bilevel_lists.DECAY * sum(p.square().sum() for p in twin.network.parameters())).backward()
    training.step()
    for moved, p in zip(training.network.parameters(), twin.network.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(moved, p - 0.1 * p.grad, rtol=1e-4, atol=1e-6)


def test_weights_are_learned_after_a_fifth_and_find_wrong_lists() -> None:
    training = _training("noisy_weighted", BASELINE, rate=0.1, steps=100)
    for _ in range(20):
        training.step()
    assert not training.logits.any()
    row = training.result()  # trains a hundred steps more
    assert training.logits.any()
    assert row["auroc"] > 0.6
    assert row["finite"]


def test_auroc_by_hand() -> None:
    training = _training("noisy_weighted", BASELINE)
    training.wrong = torch.tensor([True, True, False, False])
    training.logits = torch.tensor([-2.0, 0.5, 0.5, 1.0])
    assert training._auroc() == pytest.approx((1 + 1 + 0.5 + 1) / 4)


@pytest.mark.parametrize("name", BILEVEL)
def test_every_arm_has_the_same_six_configurations(name: str, tmp_path: Path) -> None:
    problem = BILEVEL[name]
    assert len(set(problem.grid)) == 6
    for arm in ARMS_SHOWN:
        wanted = bilevel_lists.runs(problem, arm, "tune", Lines(tmp_path / "none.jsonl"))
        assert {(run.learning_rate, run.second) for run in wanted} == set(problem.grid)
        assert len(wanted) == 6 * 3
    run = Run(name, BASELINE, 0.05, problem.grid[-1][1], 1.0, 20, 64, 0, "tune")
    upper = [g["lr"] for g in Training(problem, ARMS[BASELINE], run).both.param_groups if g["level"] == "upper"]
    assert upper == ([problem.uppers[-1]] if problem.uppers else [bilevel_lists.LR_UPPER])


def test_the_area_is_in_the_table() -> None:
    runs = [Run("noisy_weighted", BASELINE, 0.1, None, 1.0, 400, 64, seed, "report") for seed in (5000, 5001)]
    done = {run: {"auroc": 0.9 + 0.02 * (run.seed - 5000)} for run in runs}
    assert "sign of wrong lists, plain, stable: 0.910." in bilevel_lists.found_lists(done)
    assert bilevel_lists.found_lists({}) == ""


def test_a_diverged_run_counts_as_lost() -> None:
    row = _training("noisy_equal", BASELINE, rate=1e30).result()
    assert not row["finite"]
    assert row["curve"][-1] == [20.0, 0.0]
    assert len(row["curve"]) == 10


def test_from_tuning_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = {name: replace(problem, steps=10, batch=8) for name, problem in BILEVEL.items()}
    monkeypatch.setattr(bilevel_lists, "BILEVEL", short)
    monkeypatch.setattr("benchmarks.evidence.tables.write.BILEVEL", short)
    call = ["--problems", "noisy_equal", "--arms", BASELINE, "isotropic", "--out", str(tmp_path / "e")]
    for what in ("tune", "report", "tune", "report"):
        bilevel_lists.main([what, *call])
    path = tmp_path / "e" / "beyond.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len(Lines(path).by_run()) == 2 * (6 * 3 + 16)
    assert {len(row["curve"][0]) for row in rows if row["purpose"] == "tune"} == {2}
    assert {len(row["curve"][0]) for row in rows if row["purpose"] == "report"} == {3}
    table, figure = write_tables(tmp_path / "e", problems())
    text = table.read_text()
    assert "| the same lists, equal weights | " in text
    assert "What who has learned nothing scores" in text
    assert "Unfinished" in text
    assert figure.stat().st_size > 1000
