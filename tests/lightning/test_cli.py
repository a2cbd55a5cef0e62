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
import yaml

from newton_plugin import ArgumentError
from newton_plugin_lightning import _bases, cli
from newton_plugin_lightning._cli_errors import in_one_line
from newton_plugin_lightning._trees import configured_tree

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


# jsonargparse says such things over up to a hundred lines.
WRONG = {
    "callbacks.init_args.structure=diag": r"callbacks, NewtonLosses, structure: .*'mean'.* value: diag; .*'diagonal'\?",
    "callbacks.init_args.curvature=fischer": r".*'fisher', 'hessian', 'norm', 'auto'.*fischer; did you mean 'fisher'\?",
    "callbacks.init_args.start_step=soon": r"callbacks, NewtonLosses, start_step: .*soon",
    "callbacks.init_args.dampening=1": r"callbacks, NewtonLosses: .*dampening.*; did you mean 'damping'\?",
    "callbacks+=NewtonLoses": r"callbacks: .*NewtonLoses; did you mean 'NewtonLosses'\?",
    "max_steps=soon": r"max_steps: .*int.*soon",
}


@pytest.mark.parametrize("argument", WRONG)
def test_wrong_types_and_names_in_one_line(argument: str, in_process: InProcess) -> None:
    status, text = in_process("fit", "--config", str(CONFIG), f"--trainer.{argument}")
    assert (status, text.count("\n")) == (2, 1)
    assert re.match(r"error: trainer\." + WRONG[argument], text), text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["fit", "--trainer.max_stps=3"],
            "unrecognized arguments: --trainer.max_stps=3; did you",
        ),
        (["fit", "--config", "no.yaml"], "config: File does not exist: "),
        (["ft"], "argument subcommand: invalid choice: 'ft'"),
        (["compre"], "argument subcommand: invalid choice: 'compre' (choose from "),
        (["fit", "--model=examples.rank_digits.RankDigit"], "model, RankDigit: module 'examples.rank_digits' has no "),
        (
            ["fit", "--config", str(CONFIG), "--model.lerning_rate=1"],
            "model, RankDigits: ",
        ),
    ],
)
def test_other_mistakes_in_one_line(arguments: list[str], said: str, in_process: InProcess) -> None:
    status, text = in_process(*arguments)
    assert (status, text.count("\n")) == (2, 1)
    assert text.replace("Unrec", "unrec").startswith(f"error: {said}"), text
    if "File" not in said and arguments != ["ft"]:
        assert "; did you mean '" in text


def test_a_key_that_is_wrong_in_a_file(tmp_path: Path, in_process: InProcess) -> None:
    (tmp_path / "wrong.yaml").write_text("trainer:\n  max_stps: 3\n")
    status, text = in_process("fit", "--config", str(CONFIG), "--config", str(tmp_path / "wrong.yaml"))
    assert (status, text.count("\n")) == (2, 1)
    assert re.search(r"trainer\.max_stps.*; did you mean 'trainer\.max_steps'\?", text)


def hessian(tmp_path: Path, **arguments: Any) -> str:
    """A configuration in which the callback's curvature is an instance."""
    curvature = {"class_path": "newton_plugin.Hessian", "init_args": arguments}
    callback = {"class_path": "newton_plugin_lightning.NewtonLosses", "init_args": {"curvature": curvature}}
    (tmp_path / "hessian.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    return str(tmp_path / "hessian.yaml")


def test_a_constructor_inside_a_constructor_that_refuses(tmp_path: Path, in_process: InProcess) -> None:
    status, text = in_process("fit", "--config", str(CONFIG), "--config", hessian(tmp_path, refresh_every=0))
    assert status == 2
    assert "error: refresh_every must be a positive integer; got 0." in text
    assert "Traceback" not in text
    assert text.count("\n") <= 2  # "Seed set to 0" is Lightning's


def test_a_typo_inside_a_constructor(tmp_path: Path, in_process: InProcess) -> None:
    status, text = in_process("fit", "--config", str(CONFIG), "--config", hessian(tmp_path, refresh_evry=2))
    assert (status, text.count("\n")) == (2, 1)
    assert re.search(r"refresh_evry.*; did you mean 'refresh_every'\?", text)


# Which Lightning: that of the module's class.

MODULE = """
import {tree} as pl
import examples.classify_digits as digits

class Mine(pl.LightningModule):
    training_step = digits.ClassifyDigits.training_step
    configure_optimizers = digits.ClassifyDigits.configure_optimizers
    forward = digits.ClassifyDigits.forward

    def __init__(self, learning_rate: float = 0.001):
        super().__init__()
        self.learning_rate, self.net = learning_rate, digits.nn.Linear(64, 10)

class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return digits.DigitData().train_dataloader()
"""


@pytest.fixture(params=_bases.TREES)
def mine(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """A tree, and a module with classes of it."""
    name = f"mine_{request.param.replace('.', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE.format(tree=request.param))
    monkeypatch.syspath_prepend(tmp_path)
    return request.param, name


@pytest.mark.parametrize("given", ["in a file", "--model X", "--model=X", "--model.class_path"])
def test_the_tree_is_that_of_the_module(given: str, mine: tuple[str, str], tmp_path: Path) -> None:
    tree, name = mine
    path = f"{name}.Mine"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"model": {"class_path": path}}))
    arguments = {
        "in a file": ["--config", str(tmp_path / "mine.yaml")],
        "--model X": ["--model", path],
        "--model=X": [f"--model={path}"],
        "--model.class_path": [f"--model.class_path={path}"],
    }[given]
    assert configured_tree(["fit", *arguments]) == tree
    assert configured_tree(["fit", "--config", str(CONFIG), *arguments]) == tree  # the later one counts


def test_a_fit_of_either_tree(mine: tuple[str, str], tmp_path: Path, in_process: InProcess) -> None:
    _, name = mine
    quiet = ["logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"]
    options = [f"--trainer.{option}=false" for option in quiet] + ["--trainer.max_steps=2", "--trainer.accelerator=cpu"]
    callback = "--trainer.callbacks+=newton_plugin_lightning.NewtonLosses"
    status, text = in_process("fit", f"--model={name}.Mine", f"--data={name}.Data", *options, callback)
    assert status == 0, text


@pytest.mark.parametrize(
    "arguments", [[], ["fit"], ["fit", "--model", "no.such.Thing"], ["fit", "--config", "no.yaml"]]
)
def test_where_no_module_is_named_the_first_tree_is_taken(arguments: list[str]) -> None:
    assert configured_tree(arguments) == _bases.first_tree()


def test_errors_that_are_not_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(args: Any) -> None:
        raise ZeroDivisionError("theirs")

    monkeypatch.setattr(cli, "run", fails)
    with pytest.raises(ZeroDivisionError, match="theirs"):
        cli.main([])


def test_an_error_of_ours_is_found_behind_others() -> None:
    def chained(how: str) -> BaseException:
        try:
            try:
                raise ArgumentError("ours")
            except ArgumentError as error:
                if how == "cause":
                    raise ValueError("theirs") from error
                if how == "none":
                    raise ValueError("theirs") from None
                raise ValueError("theirs")  # noqa: B904
        except ValueError as error:
            return error

    assert in_one_line(chained("cause")) == in_one_line(chained("context")) == "ours"
    assert in_one_line(chained("none")) is None
