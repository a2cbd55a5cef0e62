"""``compare`` on the command line: the configuration of ``fit`` as it is, the arms, and what is said."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from newton_plugin_lightning import ComparisonError, cli
from newton_plugin_lightning._compare import command

ROOT = Path(__file__).parents[3]
DIGITS = ROOT / "examples" / "classify_digits.yaml"  # with a NewtonLosses and a logger
TINY = ["--trainer.max_steps=6", "--trainer.check_val_every_n_epoch=1", "--trainer.limit_val_batches=1"]
TINY += ["--trainer.limit_train_batches=3", "--trainer.val_check_interval=3"]
METRIC = ["--metric", "val/accuracy", "--mode", "max"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Exit status and all that was printed."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own calls
        try:
            status = cli.main(["compare", *arguments])
        except SystemExit as exit:
            status = int(str(exit.code or 0))
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def read(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    header, *lines = map(json.loads, (out / "runs.jsonl").read_text().splitlines())
    return header, lines


def test_the_callback_of_the_configuration_is_an_arm(tmp_path: Path, run: Any) -> None:
    out = tmp_path / "out"
    options = ["--seeds", "2", "--rates", "1", "1/2", "--arms", "plain", "default", "--out", str(out)]
    status, text = run("--config", str(DIGITS), *TINY, *METRIC, *options)
    assert status == 0, text
    assert "12 runs: plain, default, yours, each at x1/2, x1 of your learning rate, 2 seeds" in text
    assert "The NewtonLosses in your configuration is the arm 'yours'; other arms go without it." in text
    assert text.count("Verdict: ") == 1
    assert "Seed set" not in text
    header, lines = read(out)
    assert list(header["arms"]) == ["plain", "default", "yours"]
    assert all(line["failed"] is None for line in lines)
    assert {line["learning_rates"][0] for line in lines} == {0.001, 0.0005}
    curves = {line["arm"]: line["curve"] for line in lines if (line["seed"], line["rate"]) == (0, 1.0)}
    assert len(curves["plain"]) == 2
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "runs.jsonl", "table.md"]
    assert not list(ROOT.glob("checkpoints"))
    again, text = run("--config", str(DIGITS), *TINY, *METRIC, *options)  # nothing is trained
    assert again == 0
    assert "run 1 of" not in text
    status, text = run("--config", str(DIGITS), *TINY, *METRIC, *options, "--model.learning_rate=0.01")
    assert status == 2
    assert "error: " in text
    assert 'holds a comparison with another model: "{' in text


def config(tmp_path: Path, *callbacks: dict[str, Any]) -> list[str]:
    """The configuration with other callbacks."""
    text = yaml.safe_load(DIGITS.read_text())
    text["trainer"]["callbacks"] = list(callbacks)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(text))
    return ["--config", str(tmp_path / "mine.yaml"), *TINY, *METRIC, "--seeds", "2", "--rates", "1"]


def newton(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "newton_plugin_lightning.NewtonLosses", "init_args": arguments}


@pytest.mark.parametrize(
    ("callbacks", "words", "arms"),
    [
        ([], ["default"], ["plain", "default"]),
        ([newton(prog_bar=True)], ["norm"], ["plain", "norm", "default"]),  # the default by its arguments
        ([newton(curvature="norm")], ["default"], ["plain", "default", "norm"]),
        ([newton(damping=0.1)], ["default"], ["plain", "default", "yours"]),
        ([newton(damping=0.1)], ["yours"], ["plain", "yours"]),
        ([], ["mine:damping=0.1,structure=mean", "clipped"], ["plain", "mine", "clipped"]),
    ],
)
def test_which_arms(
    callbacks: Any, words: list[str], arms: list[str], tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def carry_out(task: Any, plan: Any, *others: Any) -> Any:
        asked.extend(plan.arms)
        raise ComparisonError("enough")

    monkeypatch.setattr(command, "carry_out", carry_out)
    status, text = run(*config(tmp_path, *callbacks), "--out", str(tmp_path / "out"), "--arms", *words)
    assert (status, text.strip().splitlines()[-1]) == (2, "error: enough")
    assert [arm.name for arm in asked] == arms
    told = [line for line in text.splitlines() if "NewtonLosses in your configuration" in line]
    assert len(told) == len(callbacks)
    if "mine" in arms:
        assert asked[1].describe() == "newton(damping=0.1, structure='mean')"


def test_callbacks_that_need_a_logger_are_taken_out_and_others_stay(tmp_path: Path, run: Any) -> None:
    others = [{"class_path": name} for name in ("LearningRateMonitor", "RichProgressBar", "ModelCheckpoint")]
    stops = {"class_path": "EarlyStopping", "init_args": {"monitor": "val/accuracy", "patience": 1, "mode": "min"}}
    given = config(tmp_path, *others, stops)
    status, text = run(*given, "--out", str(tmp_path / "out"), "--arms", "default")
    assert status == 0, text
    for callback in others:
        assert f"The callback {callback['class_path']} is taken out of all runs." in text
    header, _ = read(tmp_path / "out")
    assert "EarlyStopping" in header["callbacks"]
    status, text = run(*given, "--out", str(tmp_path / "kept"), "--arms", "default", "--keep_checkpoints")
    assert status == 0, text
    assert "ModelCheckpoint" not in text
    assert len(list((tmp_path / "kept" / "checkpoints").rglob("*.ckpt"))) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arms", "defualt"], "error: arms must be of plain.*got 'defualt'. Did you mean 'default'?"),
        (
            ["--arms", "yours"],
            "error: arms: 'yours' is the configuration's NewtonLosses, and it has none. Leave",
        ),
        (
            ["--trainer.max_stps=3"],
            "error: [Uu]nrecognized arguments: .*; did you mean 'trainer.max_steps'",
        ),
        (["--rates", "2"], "error: rates must be different positive factors.*, 1 among them"),
        (["--seeds", "1"], "error: seeds must be how many, at least 2.*got 1"),
        (["--workers", "0"], "error: workers must be a number of processes, at least 1; got 0"),
    ],
)
def test_wrong_arguments_in_one_line(arguments: list[str], said: str, tmp_path: Path, run: Any) -> None:
    given = [*config(tmp_path), "--out", str(tmp_path / "out")]
    status, text = run(*given, *arguments)
    assert status == 2
    last = text.strip().splitlines()[-1]
    assert re.match(said, last), text
    assert not (tmp_path / "out" / "runs.jsonl").exists()


def test_an_unknown_metric_lists_those_that_were_logged(tmp_path: Path, run: Any) -> None:
    given = config(tmp_path)
    given[given.index("val/accuracy")] = "val/acuracy"
    status, text = run(*given, "--out", str(tmp_path / "out"))
    assert status == 2
    assert "error: metric must be a name that was logged in training: loss, " in text
    assert "val/accuracy; got val/acuracy was not logged." in text


@pytest.mark.slow
def test_killed_in_the_middle_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """By a signal that cannot be caught, with two processes at work."""
    given = [*config(tmp_path), "--trainer.max_steps=60", "--seeds", "6", "--arms", "default", "--workers", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "newton_plugin_lightning", "compare", *given, "--out", str(out)]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    assert start(tmp_path / "whole").wait(500) == 0
    killed = start(tmp_path / "parts")
    path = tmp_path / "parts" / "runs.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < 4:
        assert killed.poll() is None, "killed too late"
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(path.read_text().splitlines()) < 13
    assert start(tmp_path / "parts").wait(500) == 0
    for name in ("runs.jsonl", "table.md", "curves.png"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
