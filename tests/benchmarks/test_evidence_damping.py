"""Accuracy against damping: which runs there are, and the table and figure that their lines make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch
from benchmarks.evidence import __main__ as command
from benchmarks.evidence.problems.registry import problems
from benchmarks.evidence.tables.damping import damping_table
from benchmarks.evidence.tables.write import write_tables
from benchmarks.evidence.training import plan
from benchmarks.evidence.training.arms import ARMS, BASELINE, SEARCH_RATES
from benchmarks.evidence.training.damping import CURVATURES, DAMPED, DAMPINGS, PROBLEMS, damping_groups, fixed
from benchmarks.evidence.training.runs import SEARCH_SEEDS, Lines, Run

import newton_plugin as npl

EVERY = problems()
ROW = {"curve": [[600, 0.0]], "finite": True, "kept": 0, "newton_plugin": "0", "commit": "c", "torch": "2"}


def _score(run: Run) -> float:
    """By hand: best at damping 1 for Fisher, and at the largest learning rate but for one damping."""
    if run.arm == BASELINE:
        return 40.0 + 100 * run.learning_rate + run.seed % 2
    peak = 20.0 if run.arm == fixed("Fisher") and run.second == 1.0 else 0.0
    slope = -100 if run.second == 1e-3 else 100
    return 41.0 + peak + slope * run.learning_rate + run.seed % 2


def _done(problem: str = "single_10") -> dict[Run, dict]:
    groups = damping_groups(EVERY[problem], 0.1, "digits")
    return {run: ROW | {"curve": [[600, _score(run)]]} for group in groups for run in group}


def test_every_point_has_the_same_seeds_and_rates_and_no_test_data() -> None:
    groups = list(damping_groups(EVERY["logistic_5"], 3.0, "digits"))
    assert len(groups) == 1 + len(CURVATURES) * (1 + len(DAMPINGS))
    for group in groups:
        assert len({(run.arm, run.second) for run in group}) == 1
        assert {(run.seed, run.learning_rate) for run in group} == {(s, r) for s in SEARCH_SEEDS for r in SEARCH_RATES}
        assert {(run.purpose, run.sharpness) for run in group} == {("search", 3.0)}
    assert DAMPINGS[0] == 1e-3
    assert DAMPINGS[-1] == 1e3


def test_a_fixed_damping_is_fixed() -> None:
    for name in CURVATURES:
        make = DAMPED[fixed(name)].newton
        auto = ARMS[name].newton
        assert make is not None
        assert auto is not None
        curvature, damping = make(10.0)
        assert isinstance(damping, npl.Tikhonov)
        assert type(curvature) is type(auto(None)[0])
        y = torch.randn(4, 3, dtype=torch.float64)
        step = npl.newton_step(
            torch.nn.functional.cross_entropy, y, torch.arange(4) % 3, curvature=curvature, damping=damping
        )
        assert float(step.damping) == pytest.approx(10.0)


def test_the_table_by_hand() -> None:
    text = damping_table(_done(), EVERY)
    best, at_fixed = (
        part.splitlines() for part in text.split("Each point at its best")[1].split("All at the learning rate")
    )
    row = next(line for line in best if line.startswith("| Fisher |"))
    # Best rate .03, plain 43.5: auto 44.5; at 1e-3 the smallest rate is best; at 1 the peak.
    assert row.startswith("| Fisher | 44.5 (+1.0*) | 41.2 (-2.3*) | 44.5 (+1.0*) | 44.5 (+1.0*) | 64.5 (+21.0*) |")
    row = next(line for line in at_fixed if line.startswith("| Fisher |"))
    assert row.startswith("| Fisher | 42.5 (+1.0*) | 40.5 (-1.0*) | 42.5 (+1.0*)")
    assert "| plain, stable | 43.5 |" in text
    assert f"{len(_done())} runs, 0 left the finite numbers" in text


def test_a_lost_run_counts_as_zero() -> None:
    done = {run: row | {"finite": run.second != 10.0} for run, row in _done().items()}
    assert "| 0.0 (-43.5*) |" in damping_table(done, EVERY)


def test_a_table_of_the_lines_that_there_are(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "e" / "damping.jsonl")
    for run, row in _done().items():
        if run.arm in (BASELINE, fixed("Fisher")) and run.seed < 2003 and run.learning_rate > 3e-3:
            lines.append(run, row)
    table, figure = write_tables(tmp_path / "e", EVERY)
    assert [path.name for path in (table, figure)] == ["e_damping.md", "e_damping.png"]
    assert "| Hessian |  |  |" in table.read_text()  # what has not been run is empty
    assert matplotlib.image.imread(figure).shape[0] > 300


def test_damping_is_resumed_and_asks_for_the_chosen_sharpness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = {name: replace(EVERY[name], steps=10, batch=4) for name in ("single_10", "logistic_5")}  # type: ignore[type-var]
    monkeypatch.setattr(command, "problems", lambda scale, folder, device="cpu": every)
    monkeypatch.setattr("benchmarks.evidence.training.damping.SEARCH_SEEDS", range(2000, 2002))
    monkeypatch.setattr("benchmarks.evidence.training.damping.DAMPINGS", (0.1, 10.0))
    call = ["damping", "--problems", "single_10", "--out", str(tmp_path)]
    command.main(call)
    path = tmp_path / "damping.jsonl"
    text = path.read_text()
    assert len(text.splitlines()) == 2 * len(SEARCH_RATES) * (1 + len(CURVATURES) * 3)
    assert {run.sharpness for run in Lines(path).by_run()} == {0.1}
    path.write_text("\n".join(text.splitlines()[:-5]) + "\n")
    command.main(call)
    assert len(Lines(path).by_run()) == len(text.splitlines())
    assert path.read_text().startswith(text[: len(text) // 2])
    with pytest.raises(LookupError, match="has no line yet"):  # nobody has tuned logistic_5 here
        command.main(["damping", "--problems", "logistic_5", "--out", str(tmp_path)])


def test_problems_of_the_table_exist() -> None:
    assert set(PROBLEMS) <= set(EVERY)
    assert plan.sharpness(EVERY["single_10"], "digits", "cpu", {}) == 0.1
