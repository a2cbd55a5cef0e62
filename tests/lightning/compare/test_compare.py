"""A comparison from beginning to end: what is trained, what is kept, and what a stop in the middle changes: nothing."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lightning.compare import small

from newton_plugin import ArgumentError, ArgumentTypeError
from newton_plugin_lightning import ComparisonError, compare
from newton_plugin_lightning._compare import one_run

NEAR = {"seeds": 2, "arms": ["default"], "rates": [1, 2], "metric": "val/loss", "mode": "min"}


def run(out: Path, make: Any = small.make, **changes: Any) -> Any:
    return compare(make, small.loaders, out=out, max_epochs=3, **{**NEAR, **changes})


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def by_hand(tree: str, seed: int, lr: float) -> float:
    """One plain run, written out."""
    import importlib

    pl = importlib.import_module(tree)
    pl.seed_everything(seed, workers=True)
    module, (train, validation) = small.module(tree, lr), small.loaders()
    quiet = dict.fromkeys(["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"], False)
    trainer = pl.Trainer(max_epochs=3, accelerator="cpu", **quiet)
    trainer.fit(module, train, validation)
    return float(trainer.callback_metrics["val/loss"])


@pytest.mark.parametrize("tree", small.TREES)
def test_every_run_is_the_one_written_by_hand(tree: str, tmp_path: Path) -> None:
    found = run(tmp_path, functools.partial(small.module, tree), accelerator="cpu")
    header, *rest = lines(tmp_path)
    assert header["metric"] == "val/loss"
    assert [(line["seed"], line["arm"], line["rate"]) for line in rest] == [
        (seed, arm, rate) for seed in (0, 1) for arm in ("plain", "default") for rate in (1.0, 2.0)
    ]
    for line in rest:
        assert line["failed"] is None
        assert line["learning_rates"] == [0.01 * line["rate"]]
        assert [step for step, _ in line["curve"]] == [4, 8, 12]
        assert line["curve"][-1][1] == line["value"]
        by = by_hand(tree, line["seed"], 0.01 * line["rate"])
        assert (line["value"] == pytest.approx(by, rel=1e-6)) == (line["arm"] == "plain")
    assert found.verdict in found.report
    assert (tmp_path / "table.md").read_text() == str(found)
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_manual_optimization_too(tmp_path: Path) -> None:
    run(tmp_path, functools.partial(small.module, small.TREES[0], manual=True))
    for line in lines(tmp_path)[1:]:
        if line["arm"] == "plain":
            by = by_hand(small.TREES[0], line["seed"], 0.01 * line["rate"])
            assert line["value"] == pytest.approx(by, rel=1e-6)


@pytest.mark.parametrize("stopped_after", [1, 5])
def test_stopped_in_the_middle_it_ends_with_the_same_bytes(
    stopped_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole")
    made, calls = one_run.Follow, 0

    def stops(metric: str) -> Any:
        nonlocal calls
        calls += 1
        if calls > stopped_after:
            raise KeyboardInterrupt
        return made(metric)

    monkeypatch.setattr(one_run, "Follow", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts")
    monkeypatch.undo()
    assert len(lines(tmp_path / "parts")) == 1 + stopped_after
    run(tmp_path / "parts")
    for name in ("runs.jsonl", "table.md", "curves.png"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_comparison_that_is_complete_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path)
    monkeypatch.setattr(one_run, "Follow", None)
    assert str(run(tmp_path)) == str(first)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"metric": "val/other"}, "metric"),
        ({"mode": "max"}, "mode"),
        ({"rates": [1, 3]}, "rates"),
        ({"arms": ["norm"]}, "arms"),
        ({"arms": {"default": {"damping": 0.1}}}, "arms"),
        ({"seeds": [0, 2]}, "seeds"),
        ({"gradient_clip_val": 0.1}, "trainer"),
        ({"make": functools.partial(small.module, small.TREES[1])}, "module"),
    ],
)
def test_another_comparison_in_the_same_folder_is_refused(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    run(tmp_path)
    before = (tmp_path / "runs.jsonl").read_bytes()
    with pytest.raises(ComparisonError, match=f"another {named}: .* Take another --out, or the same {named}"):
        run(tmp_path, **change)
    assert (tmp_path / "runs.jsonl").read_bytes() == before


def test_a_failed_run_is_a_line_and_counts_as_failed(tmp_path: Path) -> None:
    found = run(tmp_path, functools.partial(small.module, small.TREES[0], nan_below=1e9))
    assert {line["failed"] for line in lines(tmp_path)[1:]} == {"val/loss is nan"}
    assert all(line["value"] is None for line in lines(tmp_path)[1:])
    assert found.verdict == "nothing can be said, because every run failed."
    assert "plain failed 4 times: val/loss is nan" in found.report


def test_an_arm_that_raises_is_a_failed_arm(tmp_path: Path) -> None:
    found = run(tmp_path, arms={"lost": {"boundary": "no_such_module"}})
    failed = [line for line in lines(tmp_path)[1:] if line["failed"]]
    assert {line["arm"] for line in failed} == {"lost"}
    assert len(failed) == 4
    assert failed[0]["failed"].startswith("ArgumentError: boundary='no_such_module' names neither")
    assert "with 2 runs of lost that failed" in found.verdict


def test_plain_training_that_raises_stops_everything(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match=r"plain training at your own .* ZeroDivisionError: theirs\. Mend it"):
        run(tmp_path, functools.partial(small.module, small.TREES[0], fail=True))
    assert not (tmp_path / "runs.jsonl").exists()


def test_a_metric_that_is_not_logged(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match=r"logged in training: val/loss, val/other; got val/los was not"):
        run(tmp_path, metric="val/los")


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"metric": ""}, ArgumentError, "metric must be a name that the module logs; got ''"),
        ({"mode": "maximum"}, ArgumentError, "mode must be 'max' or 'min'.*got 'maximum'"),
        ({"seeds": 1}, ArgumentError, "seeds must be how many, at least 2.*got 1"),
        ({"seeds": [0, 0]}, ArgumentError, r"different seeds.*got \[0, 0\]"),
        ({"seeds": True}, ArgumentError, "got True"),
        ({"rates": [2, 3]}, ArgumentError, r"1 among them; got \[2.0, 3.0\]"),
        ({"rates": [1, -1]}, ArgumentError, r"positive factors.*got \[1.0, -1.0\]"),
        ({"arms": ["plain"]}, ArgumentError, "arms must name something beside plain"),
        ({"arms": ["defalt"]}, ArgumentError, "got 'defalt'. Did you mean 'default'?"),
        ({"arms": ["yours"]}, ArgumentError, "'yours' is the callback of a configuration, and there is none"),
        ({"arms": {"a": {"dampin": 1}}}, ArgumentError, "got 'dampin'. Did you mean 'damping'?"),
        ({"arms": {"a": {"damping": -1.0}}}, ArgumentError, "damping must be positive"),
        ({"arms": {"a": "hessian"}}, ArgumentTypeError, "arguments of NewtonLosses, a dict; got 'hessian' for 'a'"),
        ({"arms": ["a:damping"]}, ArgumentError, "written name:argument=value.*got 'a:damping'"),
        ({"arms": ["a:damping=1", "a:damping=2"]}, ArgumentError, "got 'a' more than once"),
        ({"workers": 0}, ArgumentError, "workers must be a number of processes, at least 1; got 0"),
        ({"make": 3}, ArgumentTypeError, "make_module must be a function without arguments.*got int"),
        ({"callbacks": []}, ArgumentTypeError, "callbacks must be a function that returns a list.*got list"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], kind: type[Exception], said: str, tmp_path: Path) -> None:
    with pytest.raises(kind, match=said):
        run(tmp_path, **change)
    assert not (tmp_path / "runs.jsonl").exists()


def test_the_program_around_it_stays_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(5), random.seed(5)
    expected = torch.rand(3), random.random()
    torch.manual_seed(5), random.seed(5)
    threads = torch.get_num_threads()
    run(tmp_path)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    assert torch.get_num_threads() == threads


def test_own_callbacks_are_made_anew_for_each_run(tmp_path: Path) -> None:
    made = []

    def callbacks() -> list[Any]:
        made.append(small.importlib.import_module(small.TREES[0]).callbacks.EarlyStopping("val/loss", patience=0))
        return made[-1:]

    run(tmp_path, callbacks=callbacks)
    assert len(made) == 8


def test_seeds_may_be_added_while_they_could_show_nothing(tmp_path: Path) -> None:
    run(tmp_path, rates=[1], seeds=2)
    first = lines(tmp_path)
    run(tmp_path, rates=[1], seeds=6)  # with one comparison 6 can
    assert lines(tmp_path)[1 : len(first)] == first[1:]
    assert len(lines(tmp_path)) == 1 + 12
    with pytest.raises(ComparisonError, match=r"another seeds: .* make p-values too small"):
        run(tmp_path, rates=[1], seeds=7)


def test_functions_that_cannot_be_sent_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"with workers=2 .* sent to other processes, and these cannot"):
        run(tmp_path, lambda: small.make(), workers=2)


@pytest.mark.slow
def test_processes_give_the_same_bytes(tmp_path: Path) -> None:
    run(tmp_path / "one")
    run(tmp_path / "two", workers=2)
    for name in ("runs.jsonl", "table.md", "curves.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
def test_a_process_that_dies_is_started_again(tmp_path: Path) -> None:
    run(tmp_path / "out", small.Dies(str(tmp_path / "calls"), 1), workers=2, rates=[1])
    assert len((tmp_path / "calls").read_text().splitlines()) == 1 + 4
    assert [line["failed"] for line in lines(tmp_path / "out")[1:]] == [None] * 4


@pytest.mark.slow
def test_a_run_whose_process_dies_twice_has_failed(tmp_path: Path) -> None:
    """Of the first three calls, by two processes, two are of one run."""
    run(tmp_path / "out", small.Dies(str(tmp_path / "calls"), 3), workers=2, rates=[1])
    failed = [line["failed"] for line in lines(tmp_path / "out")[1:] if line["failed"]]
    assert failed == ["its process died twice (exit code 9)"]
