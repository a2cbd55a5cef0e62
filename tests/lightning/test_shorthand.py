"""A user's own LightningCLI script: ``import newton_plugin_lightning``, and the callback is known by its name alone."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.cases import Functional
from tests.lightning.fits import Batches, batches_of

from newton_plugin_lightning import NewtonLosses

ROOT = Path(__file__).parents[2]
CONFIGS = ["rank_digits", "shortest_path", "classify_digits"]
QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture
def script(pl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``python train.py fit ...``, which is ``LightningCLI(Model, Data)``; returns the CLI after its subcommand."""
    monkeypatch.chdir(tmp_path)  # the configuration is saved beside the run
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own calls
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # seed_everything sets it: taken back afterwards
    monkeypatch.setenv("COLUMNS", "200")
    cli = importlib.import_module(f"{pl.__name__}.cli")

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.case = Functional()

        def training_step(self, batch: Any) -> Any:
            return self.case.loss(self.case(batch[0].float()), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Any:
            return Batches(batches_of(Functional, 4))

    def run(*arguments: str) -> Any:
        monkeypatch.setattr(
            sys, "argv", ["train.py", "fit", "--seed_everything=0", "--trainer.accelerator=cpu", *arguments]
        )
        return cli.LightningCLI(Model, Data)

    return run


def newton_of(cli: Any) -> list[NewtonLosses]:
    return [c for c in cli.trainer.callbacks if isinstance(c, NewtonLosses)]


def test_callback_by_its_name(script: Any) -> None:
    done = script("--trainer.callbacks+=NewtonLosses", "--trainer.max_epochs=1", *QUIET)
    (newton,) = newton_of(done)
    assert newton.hook.diagnostics()["step_norm"] > 0


def test_its_arguments_follow(script: Any) -> None:
    arguments = ["damping=0.1", "structure=isotropic", "prog_bar=true", "log=false"]
    more = [f"--trainer.callbacks.{a}" for a in arguments]
    (newton,) = newton_of(script("--trainer.callbacks+=NewtonLosses", *more, "--trainer.fast_dev_run=1", *QUIET))
    assert repr(newton.hook).startswith("LossHook(damping=0.1, structure='isotropic')")
    assert newton.prog_bar
    assert not newton.log_diagnostics


def test_beside_other_callbacks(script: Any) -> None:
    others = ["--trainer.callbacks+=TQDMProgressBar", "--trainer.callbacks+=NewtonLosses"]
    done = script(*others, "--trainer.callbacks.damping=0.2", "--trainer.fast_dev_run=1", QUIET[0])
    assert len(newton_of(done)) == 1
    assert {"TQDMProgressBar", "NewtonLosses"} <= {type(c).__name__ for c in done.trainer.callbacks}


def test_print_config_shows_every_argument(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script("--trainer.callbacks+=NewtonLosses", "--print_config")
    assert stopped.value.code == 0
    (shown,) = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert shown["class_path"] == "newton_plugin_lightning.NewtonLosses"
    assert shown["init_args"] == NewtonLosses.__init__.__kwdefaults__


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--trainer.callbacks+=NewtonLoses", "NewtonLoses"),
        ("--trainer.callbacks.dampening=0.1", "dampening"),
        ("--trainer.callbacks.structure=isotropc", r"'mean', 'per_sample', 'isotropic'"),
        ("--trainer.callbacks.damping=-1", "damping must be positive and finite; got -1"),
    ],
)
def test_what_is_misspelt_is_said(argument: str, said: str, script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as stopped:
        script("--trainer.callbacks+=NewtonLosses", argument, "--trainer.fast_dev_run=1")
    assert re.search(said, capsys.readouterr().err + str(stopped.value))


@pytest.mark.parametrize("name", CONFIGS)
def test_each_yaml_has_its_command_comments_and_a_part_to_delete(name: str) -> None:
    text = (ROOT / "examples" / f"{name}.yaml").read_text()
    assert f"python -m newton_plugin_lightning fit --config examples/{name}.yaml" in text
    assert text.count("# Delete from here ...") == text.count("# ... to here for the plain run.") == 1
    config = yaml.safe_load(text)
    named = [c["class_path"] for c in config["trainer"]["callbacks"]]
    assert "newton_plugin_lightning.NewtonLosses" in named
    arguments = config["trainer"]["callbacks"][named.index("newton_plugin_lightning.NewtonLosses")]["init_args"]
    NewtonLosses(**arguments)


def test_a_misspelt_class_path_is_answered_with_the_one_that_was_meant(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script("--trainer.callbacks=newton_plugin_lightning.NewtonLoss", "--trainer.fast_dev_run=1")
    said = " ".join(capsys.readouterr().err.split())
    assert "has no attribute 'NewtonLoss'; did you mean 'NewtonLosses'?" in said


def test_a_name_that_is_like_no_other() -> None:
    with pytest.raises(AttributeError, match=r"module 'newton_plugin_lightning' has no attribute 'xyz'$"):
        importlib.import_module("newton_plugin_lightning").xyz  # noqa: B018
