"""The examples run, on tiny budgets, and say only what they measured."""

from __future__ import annotations

import inspect
import itertools
import json
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from examples import demo, demo_arms, demo_report
from examples.demo_runs import train
from examples.digit_lists import PARTS, DigitLists, digit_images
from examples.rank_digits import DigitRankingData, RankDigits, pl

from newton_plugin.algorithms import RankingLoss
from newton_plugin_lightning import NewtonLosses

EXAMPLES = Path(demo.__file__).parent


def test_no_image_is_in_two_parts() -> None:
    parts = {part: digit_images(part)[0] for part in PARTS}
    assert [len(images) for images in parts.values()] == [1000, 300, 497]
    rows = {part: {tuple(row.tolist()) for row in images} for part, images in parts.items()}
    for a, b in itertools.combinations(rows, 2):
        assert not rows[a] & rows[b], (a, b)


@pytest.mark.parametrize("n", [2, 5, 10])
def test_lists_hold_different_digits_with_their_ranks(n: int) -> None:
    """Looked up image by image."""
    lists = DigitLists("validation", n, batch_size=7, batches=3, seed=0)
    images, labels = digit_images("validation")
    digit_of = {tuple(row.tolist()): int(d) for row, d in zip(images, labels, strict=True)}
    batches = list(lists)
    assert len(batches) == len(lists) == 3
    seen = set()
    for x, ranks in batches:
        assert x.shape == (7, n, 64)
        for row, rank in zip(x, ranks, strict=True):
            digits = [digit_of[tuple(image.tolist())] for image in row]
            assert len(set(digits)) == n
            assert rank.tolist() == [sorted(digits).index(d) for d in digits]
            seen |= set(digits)
    assert seen == set(range(10)) or n == 2


def test_training_lists_are_fresh_and_evaluation_lists_fixed() -> None:
    def first(lists: DigitLists) -> torch.Tensor:
        return next(iter(lists))[0]

    fresh, fixed = DigitLists("train", 3, 4, 2, seed=0), DigitLists("test", 3, 4, 2, seed=0, fixed=True)
    assert not torch.equal(first(fresh), first(fresh))
    assert torch.equal(first(fixed), first(fixed))
    same, other = DigitLists("train", 3, 4, 2, seed=0), DigitLists("train", 3, 4, 2, seed=1)
    expected = first(DigitLists("train", 3, 4, 2, seed=0))
    assert torch.equal(first(same), expected)
    assert not torch.equal(first(other), expected)
    data = DigitRankingData(n=3, steps=2)
    assert sum(len(r) for _, r in data.val_dataloader()) == sum(len(r) for _, r in data.test_dataloader()) == 2000


def test_both_losses_are_the_same_number_in_float64() -> None:
    torch.manual_seed(0)
    scores = torch.randn(8, 5, dtype=torch.float64)
    ranks = torch.rand(8, 5).argsort(-1)
    textbook, stable = (RankDigits(loss=kind, temperature=1.0).ranking_loss(scores, ranks) for kind in KINDS)
    assert textbook.item() == pytest.approx(stable.item(), rel=1e-12)


KINDS: Any = ("textbook", "neural_sort")


@pytest.mark.parametrize("newton", [None, {"curvature": "fisher", "damping": "auto"}], ids=["plain", "newton"])
@pytest.mark.parametrize("loss", get_args(inspect.signature(RankDigits).parameters["loss"].annotation))
def test_every_loss_trains(loss: Any, newton: dict[str, Any] | None) -> None:
    torch.manual_seed(0)
    model = RankDigits(loss, temperature=0.5)
    before = [p.clone() for p in model.parameters()]
    pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        limit_val_batches=0,
        callbacks=[] if newton is None else [NewtonLosses(**newton)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, DigitRankingData(n=4, batch_size=8, steps=2))
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.isfinite().all()
        assert new.numel() == 1 or not torch.equal(old, new)  # no loss depends on the last bias: a shift of the scores


def test_one_argument_chooses_the_method_and_temperature_its_sharpness() -> None:
    scores, ranks = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)), torch.arange(5).expand(8, 5)
    for loss, method in [
        ("neural_sort", RankingLoss("neural_sort", temperature=0.25)),
        ("soft_sort", RankingLoss("soft_sort", temperature=0.25)),
        ("sorting_network", RankingLoss("sorting_network", steepness=4.0)),
    ]:
        got = RankDigits(cast("Any", loss), temperature=0.25).ranking_loss(scores, ranks)
        assert torch.equal(got, method(scores, ranks))


def test_a_run_is_reproducible_and_learns() -> None:
    job = demo_arms.Job(demo_arms.LONG, demo_arms.LONG.arms[3], seed=0, steps=40)
    runs = [train(job, lambda steps: None) for _ in range(2)]
    for run in runs:
        run.pop("seconds")
    assert runs[0] == runs[1]
    assert runs[0]["elements"] > 0.3  # chance: 0.1
    assert [step for step, _ in runs[0]["validation"]] == list(range(4, 44, 4))


def test_the_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = demo.main(["--seeds", "2", "--steps", "10", "--workers", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert len(runs) == len(told) == 2 * sum(len(s.arms) for s in demo_arms.SETTINGS)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    for setting in demo_arms.SETTINGS:
        assert setting.title in printed
        for arm in setting.arms:
            (line,) = [line for line in _table(printed, setting) if line.strip().startswith(arm.name + "  ")]
            shares = [100 * r["full"] for r in runs if (r["setting"], r["arm"]) == (setting.title, arm.name)]
            assert f"{np.mean(shares):.1f} ({np.std(shares, ddof=1):.1f})" in line
    assert "not tuned" in " ".join(printed.split())


def _table(printed: str, setting: demo_arms.Setting) -> list[str]:
    lines = printed.splitlines()
    start = next(k for k, line in enumerate(lines) if setting.title in line)
    return lines[start : start + 6 + len(setting.arms)]


def test_paired_differences_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 6))
    mean, half = demo_report.paired_difference(a, b)
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    assert np.isnan(demo_report.paired_difference(a[:1], b[:1])[1])


@pytest.mark.slow
def test_worker_processes_give_the_same_runs(tmp_path: Path) -> None:
    alone = demo.main(["--seeds", "1", "--steps", "10", "--workers", "1", "--out", str(tmp_path)])
    together = demo.main(["--seeds", "1", "--steps", "10", "--workers", "2", "--out", str(tmp_path)])
    for run in alone + together:
        run.pop("seconds")
    assert alone == together


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 100, path.name
