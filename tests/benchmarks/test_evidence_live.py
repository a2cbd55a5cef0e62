"""Live runs: an ordinary loop with the hook of its arm, from the tuning to the table."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.evidence.live import problems as live_problems
from benchmarks.evidence.live.__main__ import main
from benchmarks.evidence.live.plan import at_rate_of_plain, report_runs, tuning_runs
from benchmarks.evidence.live.problems import LIVE, LiveProblem
from benchmarks.evidence.live.train import Training, hook_of
from benchmarks.evidence.live.two_heads import TwoHeads, _images_and_ink
from benchmarks.evidence.problems.registry import problems
from benchmarks.evidence.tables.report import report_table
from benchmarks.evidence.training import plan
from benchmarks.evidence.training.arms import ARMS, BASELINE, CANDIDATES
from benchmarks.evidence.training.runs import Lines, Purpose, Run
from torch import nn

import newton_plugin as npl

TASKS = [name for name in LIVE if name.endswith("_adam")]


def _run(problem: LiveProblem, arm: str, rate: float | None = None, steps: int = 6, seed: int = 7,
         purpose: Purpose = "tune") -> Run:  # fmt: skip
    configurations = problem.configurations(arm)
    chosen, second = configurations[len(configurations) // 2]
    return Run(problem.name, arm, rate or chosen, second, None, steps, problem.batch, seed, purpose)


def _training(name: str, arm: str = BASELINE, **options: Any) -> Training:
    return Training(LIVE[name], ARMS[arm], _run(LIVE[name], arm, **options))


def test_every_task_is_trained_by_both_optimizers_and_by_no_stack() -> None:
    assert len(LIVE) == 2 * len(TASKS) == 16
    assert not set(LIVE) & set(problems())
    for problem in LIVE.values():
        assert problem.name.endswith(problem.optimizer)
        assert set(problem.without) < set(ARMS)
        assert BASELINE not in problem.without


@pytest.mark.parametrize("name", LIVE)
def test_six_configurations_with_the_factor_of_the_problem(name: str) -> None:
    p = LIVE[name]
    for arm in ARMS:
        assert len(set(p.configurations(arm))) == 6
        assert {run.seed for run in tuning_runs(p, arm)} == {1000, 1001, 1002}
    rates = [rate for rate, _ in p.configurations(BASELINE)]
    assert rates[0] == pytest.approx(p.factor * (1e-3 if p.optimizer == "adam" else 1e-2))


@pytest.mark.parametrize("name", LIVE)
@pytest.mark.parametrize("arm", [BASELINE, "isotropic"])
def test_equal_runs_give_equal_results_whoever_trains_beside_them(name: str, arm: str) -> None:
    first, beside, again = _training(name, arm), _training(name, BASELINE, seed=8), _training(name, arm)
    row = first.result()
    beside.result()
    assert again.result()["curve"] == row["curve"]
    assert row["finite"]
    trained = zip(first.parameters, again.parameters, beside.parameters, strict=True)
    assert all(torch.equal(p, q) and not torch.equal(p, other) for p, q, other in trained)
    for _, score in row["curve"]:
        assert 0 <= score <= 100


@pytest.mark.parametrize("name", LIVE)
def test_arms_see_the_same_weights_batches_and_noise(name: str) -> None:
    plain, ours = _training(name), _training(name, "soft normalisation")
    for a, b in zip((*plain.data, *plain.parameters), (*ours.data, *ours.parameters), strict=True):
        assert torch.equal(a, b)
    for training in (plain, ours):
        training.step()
    for generator in ("batches", "noise"):
        assert torch.equal(getattr(plain, generator).get_state(), getattr(ours, generator).get_state())
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters, ours.parameters, strict=True))


@pytest.mark.parametrize("arm", [BASELINE, "clipped", "short memory", "normalised", "isotropic", "Fisher, fixed"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_run_is_an_ordinary_loop(arm: str, optimizer: str) -> None:
    """The obvious twin, on the problem with two heads."""
    training = _training(f"two_heads_01_{optimizer}", arm)
    run, known, task = training.run, ARMS[arm], TwoHeads(0.1)
    if known.clips:
        run = training.run = replace(run, second=0.1)
    torch.manual_seed(run.seed)
    network: Any = task.network()
    adam = optimizer == "adam"
    options: dict[str, Any] = {"betas": (0.9, known.beta2)} if adam else {"momentum": 0.9}
    moves = (torch.optim.Adam if adam else torch.optim.SGD)(network.parameters(), lr=run.learning_rate, **options)
    hook: Any = nn.Identity()
    if known.newton is not None:
        curvature, damping = known.newton(run.second)
        hook = npl.LossHook(curvature=curvature, damping=damping)
    generator, squares = torch.Generator().manual_seed(run.seed), []
    images, labels, ink = _images_and_ink("train")
    for step in range(run.steps):
        for group in moves.param_groups:
            group["lr"] = run.learning_rate * (1 + math.cos(math.pi * step / run.steps)) / 2
        index = torch.randint(1000, (32,), generator=generator)
        logits, measured = network(images[index])
        loss = nn.functional.cross_entropy(logits, labels[index]) + 0.1 * (measured - ink[index]).square().mean()
        moves.zero_grad()
        hook(loss).backward()
        gradients = [p.grad for p in network.parameters()]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        squares.append(norm**2)
        if known.clips:
            assert norm > 0.1  # or nothing was tested
            for g in gradients:
                g *= 0.1 / norm
        if known.normalises:
            weights = [0.9**k for k in reversed(range(len(squares)))]
            for g in gradients:
                g /= math.sqrt(sum(w * s for w, s in zip(weights, squares, strict=True)) / sum(weights))
        moves.step()
        training.step()
    start = _training(f"two_heads_01_{optimizer}", arm)
    for p, twin, first in zip(training.parameters, network.parameters(), start.parameters, strict=True):
        torch.testing.assert_close(p, twin, rtol=1e-4, atol=1e-5)
        assert float((p - first).detach().abs().max()) > 1e-3


def test_an_arm_has_the_hook_of_its_curvature() -> None:
    gated = hook_of(ARMS["gated"], None)  # whose rule is for stacks of replicas
    assert isinstance(gated, npl.LossHook)
    assert "GatedFisher(" in repr(gated)
    assert hook_of(ARMS[BASELINE], None) is None
    first, second = hook_of(ARMS["isotropic"], None), hook_of(ARMS["isotropic"], None)
    assert isinstance(first, npl.LossHook)
    assert first is not second  # a running state for each run
    with pytest.raises(ValueError, match="stacks of replicas"):
        hook_of(next(arm for arm in CANDIDATES.values() if arm.rule is not None), None)


def test_a_diverged_run_counts_as_lost() -> None:
    row = _training("diabetes_sgd", rate=1e20, steps=20, purpose="report").result()
    assert not row["finite"]
    assert row["curve"][-1] == [20.0, 0.0, 0.0]
    assert len(row["curve"]) == 10


def test_test_data_is_seen_in_reports_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(Training, "_score", lambda self, part: seen.append(part) or 1.0)
    _training("diabetes_adam").result()
    assert set(seen) == {"validation"}
    _training("diabetes_adam", purpose="report").result()
    assert set(seen) == {"validation", "test"}


def _tuned(runs: list[Run], best: float) -> dict[Run, dict[str, Any]]:
    """Lines in which the runs with this learning rate are best."""
    return {run: {"curve": [[1.0, float(run.learning_rate == best)]], "finite": True} for run in runs}


def test_at_the_rate_of_plain() -> None:
    live, stacked = LIVE["pinn_sgd"], problems()["linear_adam"]
    done = _tuned(tuning_runs(live, BASELINE), live.factor * 0.1)
    done |= _tuned(plan.tuning_runs(stacked, BASELINE, None, "digits", "cpu"), 5e-3)
    for problem, rate in ((live, live.factor * 0.1), (stacked, 5e-3)):
        for arm, second in ((BASELINE, None), ("isotropic", None), ("clipped", 0.1)):
            runs = at_rate_of_plain(problem, arm, done)
            assert len(runs) == 16
            assert {(r.problem, r.arm, r.learning_rate, r.second, r.steps, r.purpose) for r in runs} == {
                (problem.name, arm, rate, second, problem.steps, "report")
            }
        with pytest.raises(LookupError):
            at_rate_of_plain(problem, "isotropic", {})
    assert at_rate_of_plain(live, BASELINE, done) == report_runs(live, BASELINE, done)


def test_from_tuning_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    short = {"diabetes_adam": replace(LIVE["diabetes_adam"], steps=10)}
    monkeypatch.setattr(live_problems, "LIVE", short)
    call = ["--problems", "diabetes_adam", "--arms", BASELINE, "isotropic", "--out", str(tmp_path)]
    main(["report", *call])
    assert capsys.readouterr().out.count("left out") == 2  # nothing has been tuned
    for what in ("tune", "report", "noretune") * 2:
        for share in ("1/2", "2/2"):
            main([what, *call, "--share", share])
    path, other = tmp_path / "live.jsonl", tmp_path / "noretune_live.jsonl"
    rows, beside = ([json.loads(line) for line in p.read_text().splitlines()] for p in (path, other))
    assert len(rows) == len(Lines(path).by_run()) == 2 * (6 * 3 + 16)
    assert len(beside) == len(Lines(other).by_run()) == 2 * 16
    assert {len(row["curve"][0]) for row in rows if row["purpose"] == "tune"} == {2}
    assert {len(row["curve"][0]) for row in (*rows, *beside) if row["purpose"] == "report"} == {3}
    assert len({row["learning_rate"] for row in beside}) == 1
    plain = [
        [row for row in found if row["arm"] == BASELINE and row["purpose"] == "report"] for found in (rows, beside)
    ]
    assert plain[0] == plain[1]
    for done in (Lines(path).by_run(), Lines(other).by_run()):
        text = report_table("live", done, short)  # type: ignore[arg-type]
        assert "diabetes, squared error, adam" in text
        assert "| default: isotropic | " in text
