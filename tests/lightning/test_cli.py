"""The command line: in a process of its own, with either Lightning."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from newton_plugin_lightning import _bases, cli

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples" / "rank_digits.yaml"
TINY = ["--trainer.max_steps=6", "--trainer.log_every_n_steps=2", "--trainer.val_check_interval=3", "--data.steps=6"]
# With the other Lightning absent, as far as Python can tell.
WITHOUT = "import sys; sys.modules[{!r}] = None; sys.path.insert(0, ''); sys.path.insert(0, {!r}); "
RUN = "from newton_plugin_lightning.cli import main; sys.exit(main(sys.argv[1:]))"


def command(*arguments: str, absent: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    start = ["-m", "newton_plugin_lightning"]
    if absent:
        start = ["-c", WITHOUT.format(absent.split(".")[0], str(ROOT)) + RUN]
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *start, *arguments], cwd=cwd, env=environment, text=True, capture_output=True, timeout=300
    )


InProcess = Callable[..., tuple[int, str]]


@pytest.fixture
def in_process(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> InProcess:
    """The same in this process: exit status, and all that was printed."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.chdir(ROOT)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own calls
        monkeypatch.setattr(sys, "argv", ["newton_plugin_lightning", *arguments])
        try:
            status = cli.main()
        except SystemExit as exit:
            status = int(str(exit.code or 0))
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def without_callback(tmp_path: Path) -> Path:
    """The YAML with the callback's lines deleted, as its comments say."""
    text = CONFIG.read_text()
    plain, count = re.subn(r"(?s)    # Delete from here.*?# \.\.\. to here[^\n]*\n", "", text)
    assert count == 1
    assert "NewtonLosses" not in plain.split("trainer:")[1]
    (tmp_path / "plain.yaml").write_text(plain)
    return tmp_path / "plain.yaml"


def columns(folder: Path) -> set[str]:
    (path,) = folder.glob("**/metrics.csv")
    with open(path) as file:
        return set(csv.DictReader(file).fieldnames or ())


@pytest.mark.parametrize("absent", ["", _bases.TREES[0], pytest.param(_bases.TREES[1], marks=pytest.mark.slow)])
def test_fit_from_yaml(absent: str, tmp_path: Path) -> None:
    done = command("fit", "--config", str(CONFIG), *TINY, f"--trainer.logger.save_dir={tmp_path}", absent=absent)
    assert done.returncode == 0, done.stderr
    assert {"loss", "val/full", "newton/step_norm", "newton/damping"} <= columns(tmp_path)
    assert list(tmp_path.glob("**/config.yaml"))


def test_deleting_the_callbacks_lines_gives_the_plain_run(tmp_path: Path, in_process: InProcess) -> None:
    arguments = ["--config", str(without_callback(tmp_path)), *TINY, f"--trainer.logger.save_dir={tmp_path}"]
    status, text = in_process("fit", *arguments)
    assert status == 0, text
    found = columns(tmp_path)
    assert {"loss", "val/full"} <= found
    assert not any(name.startswith("newton/") for name in found)


def test_wrong_values_are_told_without_a_traceback(in_process: InProcess) -> None:
    status, text = in_process("fit", "--config", str(CONFIG), "--trainer.callbacks.init_args.damping=-1")
    assert status == 2
    assert "error: damping must be positive and finite; got -1.0" in text
    assert "Traceback" not in text


def test_help_of_the_callback(in_process: InProcess) -> None:
    status, text = in_process("fit", "--trainer.callbacks.help=newton_plugin_lightning.NewtonLosses")
    assert status == 0
    words = " ".join(text.split())
    assert "Trains with Newton Losses" in words
    assert "{auto,mean,per_sample,isotropic,diagonal,block,gated}" in words
    assert '"auto" needs no tuning: it is relative to C.' in words
    for name in ("curvature", "damping", "structure", "power", "reduction", "boundary", "feature_dims", "start_step"):
        # older jsonargparse writes .init_args. in between
        assert re.search(rf"--trainer\.callbacks\.(init_args\.)?{name} ", words)
    assert "default: fisher" in words


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("structure=diag", r"structure.*\n.*'mean', 'per_sample', 'isotropic'.*Got value: diag"),
        ("curvature=fischer", r"(?s)'fisher', 'hessian', 'norm', 'auto'.*fischer"),
        ("start_step=soon", r"start_step.*\n.*soon"),
        ("dampening=1", r"dampening"),
    ],
)
def test_wrong_types_and_names(argument: str, said: str, in_process: InProcess) -> None:
    status, text = in_process("fit", "--config", str(CONFIG), f"--trainer.callbacks.init_args.{argument}")
    assert status == 2
    assert re.search(said, text), text


def test_errors_that_are_not_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(args: Any) -> None:
        raise ZeroDivisionError("theirs")

    monkeypatch.setattr(cli, "run", fails)
    with pytest.raises(ZeroDivisionError, match="theirs"):
        cli.main([])
