"""Lines: a run that has its line is not repeated, wherever an earlier process was interrupted."""

from __future__ import annotations

import gzip
import json
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.evidence import __main__ as command
from benchmarks.evidence.data.images import digit_images
from benchmarks.evidence.problems.registry import problems
from benchmarks.evidence.tables.report import report_table
from benchmarks.evidence.tables.summary import summary_table
from benchmarks.evidence.tables.write import _shortcuts, write_tables
from benchmarks.evidence.training import plan
from benchmarks.evidence.training.arms import ARMS, BASELINE, configurations
from benchmarks.evidence.training.runs import REPORT_SEEDS, SEARCH_SEEDS, TUNING_SEEDS, Lines, Run

RUN = Run("linear_adam", BASELINE, 1e-2, None, None, 20, 8, 2000, "search")
ROW = {"curve": [[10, 50.0], [20, 60.0]], "finite": True, "kept": 0}


def test_a_run_that_has_its_line_is_not_missing(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "new" / "lines.jsonl")
    other = replace(RUN, seed=2001)
    assert lines.missing([RUN, other]) == [RUN, other]
    lines.append(RUN, ROW)
    assert lines.missing([RUN, other]) == [other]
    assert lines.by_run()[RUN]["curve"] == ROW["curve"]


def test_a_line_that_was_cut_off_is_trained_again_and_harms_none_after_it(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "lines.jsonl")
    lines.append(RUN, ROW)
    whole = lines.path.read_text()
    lines.path.write_text(whole + whole[:40])
    assert list(lines.by_run()) == [RUN]
    other = replace(RUN, seed=2001)
    lines.append(other, ROW)
    assert list(lines.by_run()) == [RUN, other]


def test_of_equal_runs_the_first_counts(tmp_path: Path) -> None:
    lines = Lines(tmp_path / "lines.jsonl")
    lines.append(RUN, ROW)
    lines.append(RUN, ROW | {"curve": [[20, 99.0]]})
    assert lines.by_run()[RUN]["curve"] == ROW["curve"]


def _append_some(path: Path, first: int) -> None:
    for seed in range(first, first + 50):
        Lines(path).append(replace(RUN, seed=seed), ROW | {"note": "x" * 5000})


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    processes = [multiprocessing.get_context("fork").Process(target=_append_some, args=(path, k)) for k in (0, 50)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(Lines(path).by_run()) == 100


def test_groups_of_seeds_have_nothing_in_common() -> None:
    groups = [set(SEARCH_SEEDS), set(TUNING_SEEDS), set(REPORT_SEEDS), set(range(8))]
    assert sum(map(len, groups)) == len(set.union(*groups))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_every_arm_has_the_same_budget(optimizer: str) -> None:
    for name, arm in ARMS.items():
        assert len(set(configurations(arm, optimizer))) == 6, name
        # Other images: two more rates below, and half a rate more for who has a second number.
        more = set(configurations(arm, optimizer, "mnist"))
        assert len(more) == (9 if arm.second else 8), name
        assert more > set(configurations(arm, optimizer))


def test_tuning_chooses_the_best_mean_and_counts_a_lost_run_as_zero() -> None:
    problem = problems()["linear_adam"]
    runs = plan.tuning_runs(problem, BASELINE, None, "digits", "cpu")
    done = {run: ROW | {"curve": [[600, 100 * run.learning_rate]]} for run in runs}
    assert plan.chosen(problem, BASELINE, None, "digits", "cpu", done).learning_rate == 5e-2
    lost = next(run for run in runs if run.learning_rate == 5e-2)
    done[lost] = done[lost] | {"finite": False, "curve": [[600, 9.0]]}
    done |= {run: ROW | {"curve": [[600, 4.0]]} for run in runs if run.learning_rate == 2e-2}
    assert plan.chosen(problem, BASELINE, None, "digits", "cpu", done).learning_rate == 2e-2
    del done[lost]
    with pytest.raises(LookupError, match="has no line yet"):
        plan.chosen(problem, BASELINE, None, "digits", "cpu", done)


def _call(out: Path, *arguments: str) -> None:
    few = ["--problems", "linear_adam", "--arms", BASELINE, "isotropic", "--out", str(out)]
    command.main([*arguments, *few])


def test_from_tuning_to_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The whole way, short; started again it trains nothing, and test data is seen by the report alone."""
    every = {"linear_adam": replace(problems()["linear_adam"], steps=20)}  # type: ignore[type-var]
    monkeypatch.setattr(command, "problems", lambda scale, folder, device="cpu": every)
    _call(tmp_path / "e", "report")
    assert "left out: linear_adam" in capsys.readouterr().out  # nothing is tuned yet
    for what in ("tune", "report", "tune", "report"):
        _call(tmp_path / "e", what)
    path = tmp_path / "e" / "no_harm.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 2 * (6 * 3 + 16)
    for row in rows:
        assert {len(point) for point in row["curve"]} == {3 if row["purpose"] == "report" else 2}
        assert row["commit"] == rows[0]["commit"]
    table, figure = write_tables(tmp_path / "e", every)
    assert figure.stat().st_size > 1000
    text = table.read_text()
    assert table.name == "e_no_harm.md"
    assert "**Unfinished: 11 of 13 trainings of an arm on a problem have not been run.**" in text
    assert "| default: isotropic | " in text
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    assert "arms have [15, 16] of 16 seeds.**" in write_tables(tmp_path / "e", every)[0].read_text()


def test_images_from_idx_files(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 4, 5), dtype=np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 10
    header = b"\0\0\x08\x03" + np.array([30, 4, 5], ">i4").tobytes()
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    header = b"\0\0\x08\x01" + np.array([30], ">i4").tobytes()
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    parts = [digit_images(part, str(tmp_path)) for part in ("train", "validation", "test")]
    assert [len(part.labels) for part in parts] == [21, 3, 6]
    assert abs(float(parts[0].images.mean())) < 1e-5
    read = np.concatenate([part.images.numpy().reshape(-1, 20) for part in parts])
    assert len({tuple(row) for row in read.round(3)}) == 30  # no image twice, none lost
    assert sorted(np.concatenate([part.labels.numpy() for part in parts])) == sorted(labels)


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds 0 files"):
        digit_images("train", str(tmp_path))
    (tmp_path / "a-images-idx3-ubyte").write_bytes(b"no")
    (tmp_path / "a-labels-idx1-ubyte").write_bytes(b"no")
    with pytest.raises(ValueError, match="is no IDX file"):
        digit_images("test", str(tmp_path))


def test_who_knows_nothing_solves_no_map() -> None:
    said = _shortcuts("paths", problems())
    assert "constant costs: 0.0" in said
    assert _shortcuts("ranking", problems()) == ""


def test_what_a_larger_grid_has_overtaken_is_not_in_the_table() -> None:
    problem, made = problems()["linear_adam"], {"newton_plugin": "0", "commit": "c", "torch": "2", "kept": 0}
    done = {}
    for run in plan.tuning_runs(problem, BASELINE, None, "mnist", "cpu"):
        done[run] = {"curve": [[1.0, float(run.learning_rate == 2e-4)]], "finite": True, **made}
    for rate, value in ((1e-3, 50.0), (2e-4, 60.0), (1e-3, 50.0)):  # whichever line comes last
        first = replace(next(iter(done)), purpose="report", learning_rate=rate)
        for run in plan.report_runs(problem, first, "mnist", "cpu"):
            done[run] = {"curve": [[1.0, 0.0, value]] * 2, "finite": True, **made}
    text = report_table("no_harm", done, problems())
    assert "| 60.0 ± 0.0 |" in text
    assert "50.0" not in text


def test_the_summary_counts_what_is_significant(tmp_path: Path) -> None:
    problem, made = problems()["linear_adam"], {"newton_plugin": "0", "commit": "c", "torch": "2", "kept": 0}
    out = Lines(tmp_path / "e" / "no_harm.jsonl")
    for arm, more in ((BASELINE, 0.0), ("isotropic", 3.0), ("Fisher", -2.0), ("Hessian", 0.0)):
        first = plan.tuning_runs(problem, arm, None, "digits", "cpu")[0]
        for k, run in enumerate(plan.report_runs(problem, replace(first, purpose="report"), "digits", "cpu")):
            wiggle = 0.1 * (k % 4) if arm != "Hessian" else (-1.0) ** k
            out.append(run, {"curve": [[1.0, 0.0, 50 + more + wiggle]] * 2, "finite": True, **made})
    text = summary_table(tmp_path / "e", ["no_harm"], problems())
    assert "| default: isotropic | 1 | 1: linear, adam +3.0 | 0 |" in text
    assert "| Fisher | 1 | 0 | 1: linear, adam -2.0 |" in text
    assert "| Hessian | 1 | 0 | 0 |" in text
