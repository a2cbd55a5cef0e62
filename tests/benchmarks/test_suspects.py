"""Scores of suspects: their areas, the contradiction against a loop, the training against the package's own hook."""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.evidence.training.runs import Lines, Run
from benchmarks.suspects import confident as folds
from benchmarks.suspects import runs as plan
from benchmarks.suspects.contradiction import Contradiction
from benchmarks.suspects.report import Row, chosen, report, verdict
from benchmarks.suspects.runs import best_rate, complete
from benchmarks.suspects.scores import auroc, in_windows, margin
from benchmarks.suspects.tasks import TASKS
from benchmarks.suspects.training import BATCH, fit, watched
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import newton_plugin as npl

NAN = torch.nan


def test_auroc_by_hand() -> None:
    # Pairs (wrong, right): .9 > .1, .9 > .5, .5 > .1, .5 = .5.
    assert auroc(torch.tensor([0.1, 0.9, 0.5, 0.5]), torch.tensor([False, True, True, False])) == 3.5 / 4
    with pytest.raises(ValueError, match="no NaN; got 1"):  # a sample that was not seen
        auroc(torch.tensor([NAN, 1.0]), torch.tensor([True, False]))


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_scikit_learns(pairs: list[tuple[int, bool]]) -> None:
    score, wrong = torch.tensor([float(s) for s, _ in pairs]), torch.tensor([w for _, w in pairs])
    if wrong.all() or not wrong.any():
        with pytest.raises(ValueError, match="wrong must name some samples and not all"):
            auroc(score, wrong)
    else:
        assert auroc(score, wrong) == pytest.approx(roc_auc_score(wrong.numpy(), score.numpy()), abs=1e-12)


def test_windows_by_hand() -> None:
    seen = torch.tensor([[1.0, NAN], [3.0, 2.0], [8.0, 5.0], [4.0, NAN]])
    found = in_windows("loss", seen)
    assert {name: value.tolist() for name, value in found.items()} == {
        "loss: all epochs": [4.0, 3.5],
        "loss: from the second epoch": [5.0, 3.5],
        "loss: first half": [2.0, 2.0],
        "loss: last": [4.0, 5.0],
    }
    assert list(in_windows("contradiction: rank 0.9", seen)) == [
        f"contradiction: rank 0.9, {window}" for window in ("all epochs", "from the second epoch", "first half")
    ]


def test_margin_by_hand() -> None:
    outputs = torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0]])
    assert margin(outputs, torch.tensor([1, 0])).tolist() == [2.0, -3.0]


def _contradictions(batches: Sequence[tuple[Tensor, Tensor]], decay: float) -> list[float]:
    """Cosines of the last batch, sample by sample, from weighted sums over all batches before it."""
    sizes, metrics, bodies = [], [], []
    for g, v in batches:
        sizes.append(float(g.square().sum(-1).mean()))
        s = float(np.average(sizes, weights=[0.9 ** (len(sizes) - 1 - k) for k in range(len(sizes))]))
        scaled = v / s**0.5
        if len(sizes) == len(batches):
            weights = torch.tensor([0.99 ** (len(metrics) - k) for k in range(len(metrics))], dtype=torch.float64)
            q = weights @ torch.stack(metrics) / weights.sum()
            d = (q + 1e-3 * q.mean()) ** -0.5
            u = torch.stack([decay ** (len(bodies) - k) * b for k, b in enumerate(bodies)]).sum(0)
            return [-float((row * d * u).sum() / ((row * d * row).sum() * (u * d * u).sum()).sqrt()) for row in scaled]
        metrics.append(scaled.mean(0).square())
        body = [row for row, own in zip(scaled, g, strict=True) if float(own.square().sum()) <= s]
        bodies.append(torch.stack([*body, torch.zeros_like(scaled[0])]).sum(0) / len(g))
    raise AssertionError


@pytest.mark.parametrize("decay", [0.9, 0.98])
def test_the_contradiction_is_what_a_loop_over_samples_finds(decay: float) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(2, 6, 3, dtype=torch.float64), torch.randn(2, 6, 5, dtype=torch.float64)) for _ in range(4)]
    watch = Contradiction()
    found = [watch(g, v) for g, v in batches]
    assert found[0][f"cosine {decay:g}"].isnan().all()
    for r in range(2):
        want = torch.tensor(_contradictions([(g[r], v[r]) for g, v in batches], decay), dtype=torch.float64)
        torch.testing.assert_close(found[-1][f"cosine {decay:g}"][r], want)
        rank = found[-1][f"rank {decay:g}"][r]
        torch.testing.assert_close(rank, want.argsort().argsort().double() / 5)


def test_a_sample_without_gradient_is_no_suspect() -> None:
    torch.manual_seed(0)
    watch, v = Contradiction(), torch.randn(1, 4, 5)
    watch(torch.ones(1, 4, 2), v)
    v[0, 1] = 0
    assert float(watch(torch.ones(1, 4, 2), v)["cosine 0.9"][0, 1]) == 0


def test_a_planted_sample_contradicts_most() -> None:
    """Least squares with inputs that all point the same way; the target of one sample has the other sign."""
    torch.manual_seed(0)
    x = 1 + torch.rand(16, 3)
    target = x @ torch.tensor([1.0, 0.5, 0.2])
    target[5] = -target[5]
    weight, watch, total = torch.zeros(3), Contradiction(), torch.zeros(16)
    for step in range(20):
        residual = (x @ weight - target).unsqueeze(-1)
        v = residual * x
        found = watch(residual.unsqueeze(0), v.unsqueeze(0))
        if step:
            total += found["cosine 0.98"][0]
        weight = weight - 0.01 * v.mean(0)
    assert int(total.argmax()) == 5
    assert total[5] > 0
    assert (total < 0).sum() == 15


@pytest.mark.parametrize("name", TASKS)
def test_sets_have_their_dose_and_it_is_nested(name: str) -> None:
    low, high = TASKS[name].draw(10, 7, 200), TASKS[name].draw(30, 7, 200)
    assert torch.equal(low.inputs, high.inputs)
    assert not (low.wrong & ~high.wrong).any()
    clean = TASKS[name].draw(0, 7, 200)
    assert not clean.wrong.any()
    assert torch.equal((high.targets != clean.targets).reshape(200, -1).any(1), high.wrong)
    # An order of five is right by chance once in 120 draws.
    assert 17 <= int(low.wrong.sum()) <= 20
    assert 55 <= int(high.wrong.sum()) <= 60


@pytest.mark.parametrize(
    ("name", "door"),
    [("labels", None), ("for_l2", None), ("labels", "hook"), ("lists", "hook"), ("for_l2", "loss")],
)
def test_a_replica_is_what_an_ordinary_loop_trains(name: str, door: str | None) -> None:
    """Plain, with the package's hook, and for paths with its loss: see the benchmark's docstring."""
    task, epochs, rate = TASKS[name], 4, 1e-2
    data = [task.draw(30, seed, 160) for seed in (1, 2)]
    networks = fit(task, data, [1, 2], [rate, rate], door is not None, epochs=epochs)
    torch.manual_seed(2)
    network = task.problem.network()
    optimizer = torch.optim.Adam(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * 5)
    rows = task.problem.loss(task.sharpness, [2], False)
    hook = npl.LossHook(structure="gated") if door == "hook" else None

    def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
        return rows(outputs, targets).mean()

    loss_fn = npl.newton_loss(loss_of, structure="gated") if door == "loss" else loss_of
    generator = torch.Generator().manual_seed(2)
    for _ in range(epochs):
        for index in torch.randperm(160, generator=generator).split(BATCH):
            optimizer.zero_grad()
            loss = loss_fn(network(data[1].inputs[index]), data[1].targets[index])
            (loss if hook is None else hook(loss)).backward()
            optimizer.step()
            schedule.step()
    for ours, theirs in zip(networks.parameters, network.parameters(), strict=True):
        if theirs.numel() > 1:  # the last bias moves no order: Adam makes steps of its rounding
            torch.testing.assert_close(ours[1], theirs, rtol=1e-3, atol=1e-4)


def test_every_sample_has_every_score_and_the_losses_are_those_of_the_batches() -> None:
    task, data = TASKS["labels"], [TASKS["labels"].draw(30, seed, 96) for seed in (1, 2)]
    _, scores = watched(task, data, [1, 2], [1e-2, 1e-2], epochs=3)
    assert len(scores[0]) == 18 + 4 * 4
    # What precedes the first batch is nothing; every other mean has a visit of every sample.
    finite = {name: bool(value.isfinite().all()) for name, value in scores[1].items()}
    assert all(known or (name.startswith("contradiction") and "first half" in name) for name, known in finite.items())
    torch.manual_seed(2)
    first = torch.randperm(96, generator=torch.Generator().manual_seed(2))[:BATCH]
    network = task.problem.network()
    want = nn.functional.cross_entropy(network(data[1].inputs[first]), data[1].targets[first], reduction="none")
    torch.testing.assert_close(scores[1]["loss: first half"][first].float(), want)  # half of three epochs is the first


def test_folds_train_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fold's networks never see the samples whose probabilities they give."""
    task, data = TASKS["labels"], [TASKS["labels"].draw(30, seed, 200) for seed in (1, 2)]
    seen: list[Tensor] = []

    def spy(*args: Any, members: Tensor, **more: Any) -> Any:
        seen.append(members)
        return fit(*args, members=members, **more)

    monkeypatch.setattr(folds, "fit", spy)
    found = folds.out_of_sample(task, data, [1, 2], [1e-2, 1e-2], epochs=2)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 200))
    (members,) = seen
    assert members.shape == (10, 160)
    networks = fit(
        task, [d for d in data for _ in range(5)], list(range(5, 15)), [1e-2] * 10, members=members, epochs=2
    )
    for k in range(10):
        held = torch.ones(200, dtype=torch.bool)
        held[members[k]] = False
        assert int(held.sum()) == 40
        outputs = networks.evaluate(data[k // 5].inputs[held])[k]
        torch.testing.assert_close(found[k // 5, held], outputs.softmax(-1))


def test_confident_learning_asks_cleanlab_for_every_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for cleanlab, which is not installed for the tests."""
    asked: list[tuple[str, bool]] = []

    def quality(labels: Any, probabilities: Any, *, method: str, adjust_pred_probs: bool) -> Any:
        asked.append((method, adjust_pred_probs))
        return probabilities[np.arange(len(labels)), labels]

    rank = types.ModuleType("cleanlab.rank")
    rank.get_label_quality_scores = quality  # type: ignore[attr-defined]
    whole = types.ModuleType("cleanlab")
    whole.__spec__ = importlib.machinery.ModuleSpec("cleanlab", None)
    monkeypatch.setitem(sys.modules, "cleanlab", whole)
    monkeypatch.setitem(sys.modules, "cleanlab.rank", rank)
    found = folds.confident(torch.tensor([0, 1]), torch.tensor([[0.9, 0.1], [0.8, 0.2]]))
    assert folds.is_installed()
    assert len(found) == len(set(asked)) == 4
    for score in found.values():  # a label that is unlikely is suspect
        torch.testing.assert_close(score, torch.tensor([-0.9, -0.2], dtype=torch.float64))


def _instead(task: Any, arm: str, runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Results that follow from the run: the larger rate is better, the loss finds more than the contradiction."""
    results: list[dict[str, Any]] = []
    for run in runs:
        shift = run.seed % 7 / 100
        areas = {
            "contradiction: cosine 0.9, all epochs": 0.7 + shift,
            "contradiction: rank 0.9, all epochs": 0.6 + shift,
            "loss: all epochs": 0.8 + 1.5 * shift,
            "loss: last": 0.4 - shift,
        }
        results.append({"curve": [[465.0, 100 * run.learning_rate]], "wrong": 50, "auroc": areas})
    return results


def test_lines_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[Run] = []

    def results(task: Any, arm: str, runs: Sequence[Run]) -> list[dict[str, Any]]:
        if len(trained) > 40:
            raise KeyboardInterrupt
        trained.extend(runs)
        return _instead(task, arm, runs)

    monkeypatch.setattr(plan, "_results", results)
    lines, task = Lines(tmp_path / "suspects.jsonl"), TASKS["lists"]
    with pytest.raises(KeyboardInterrupt):
        list(complete(task, lines, True))
    before = len(lines.by_run())
    assert before == len(trained) == 36 + 12
    assert best_rate(task, lines.by_run()) == 3e-2
    trained.clear()
    monkeypatch.setattr(plan, "_results", lambda *args: trained.extend(args[2]) or _instead(*args))
    list(complete(task, lines, True))
    assert len(trained) == 48, "both trainings, eight seeds, three doses"
    assert len(lines.by_run()) == before + 48
    trained.clear()
    list(complete(task, lines, True))
    assert not trained


def test_the_page_chooses_on_validation_seeds_and_says_who_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_results", _instead)
    lines = Lines(tmp_path / "suspects.jsonl")
    assert report(lines.by_run()) == "No task has all its runs yet.\n"
    list(complete(TASKS["for_l2"], lines, False))
    page = report(lines.by_run())
    assert "*contradiction: cosine 0.9, all epochs*; *loss: all epochs*" in page
    assert "Left out, with no line: gradient, head gradient, margin, confident learning" in page
    assert "| loss: all epochs | 0 | 6 | 0 |" in page
    assert "| loss: last | 6 | 0 | 0 |" in page
    assert "**does not ship**" in page.splitlines()[-1]
    assert page.endswith("against *loss: all epochs* (better in 0 rows, worse in 6).\n")


def test_a_choice_never_looks_at_the_seeds_of_the_report() -> None:
    areas = {
        ("loss: last", "tune"): [0.6], ("loss: last", "report"): [0.9],
        ("loss: all epochs", "tune"): [0.7], ("loss: all epochs", "report"): [0.1],
    }  # fmt: skip
    row = Row(TASKS["labels"], 10, "plain", areas)  # type: ignore[arg-type]
    assert chosen([row]) == {"loss": "loss: all epochs"}
    assert row.best_peer(["loss: last", "loss: all epochs"]) == "loss: all epochs"


def test_it_ships_only_if_it_wins_against_every_peer() -> None:
    assert "**ships**" in verdict({"a": (3, 2, 5), "b": (1, 0, 9)})
    assert "**does not ship**" in verdict({"a": (3, 2, 5), "b": (1, 1, 8)})
