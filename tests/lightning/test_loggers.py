"""What a user looks at while it trains: TensorBoard, CSV, and the progress bars."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from typing import Any

import pytest
from tests.cases import Functional
from tests.lightning.fits import Batches, batches_of, case_module, trainer
from tests.lightning.test_logging import KEYS

from newton_plugin import ArgumentTypeError
from newton_plugin_lightning import NewtonLosses

STEPS = {"log_every_n_steps": 2}


def fit(pl: Any, newton: NewtonLosses, *callbacks: Any, **options: Any) -> Any:
    run = trainer(pl, newton, *callbacks, **{**STEPS, **options})
    run.fit(case_module(pl, Functional), Batches(batches_of(Functional, 6)))
    return run


def test_tensorboard_and_csv_get_the_same_numbers(pl: Any, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loggers = importlib.import_module(f"{pl.__name__}.loggers")
    board, table = loggers.TensorBoardLogger(tmp_path / "board"), loggers.CSVLogger(tmp_path / "table")
    fit(pl, NewtonLosses(), logger=[board, table])
    events = accumulator.EventAccumulator(board.log_dir).Reload()
    assert {f"newton/{key}" for key in KEYS} <= set(events.Tags()["scalars"])
    with open(Path(table.log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["newton/step_norm"]]
    seen = events.Scalars("newton/step_norm")
    assert [event.step for event in seen] == [int(row["step"]) for row in rows] == [1, 3, 5]
    assert [event.value for event in seen] == pytest.approx([float(row["newton/step_norm"]) for row in rows])


def bar_of(pl: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[dict[str, Any]]]:
    """A progress bar, and the numbers that it was given to show."""
    kind = getattr(importlib.import_module(f"{pl.__name__}.callbacks"), name)
    shown: list[dict[str, Any]] = []

    class Recording(kind):  # type: ignore[misc, valid-type]
        def get_metrics(self, *args: Any, **kwargs: Any) -> Any:
            shown.append(dict(super().get_metrics(*args, **kwargs)))
            return shown[-1]

    return Recording(), shown


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("name", ["TQDMProgressBar", "RichProgressBar"])
def test_step_norm_in_the_progress_bar_when_asked(
    pl: Any, name: str, log: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a logger too; the diagnostics of the last logging step stay in the bar between two of them."""
    if name == "RichProgressBar":
        pytest.importorskip("rich")
        if pl.__version__ < "2.5":
            pytest.skip("this Lightning's RichProgressBar fails by itself with the rich of today")
    bar, shown = bar_of(pl, name, monkeypatch)
    newton = NewtonLosses(prog_bar=True, log=log)
    fit(pl, newton, bar, enable_progress_bar=True)
    assert "newton/step_norm" in shown[-1]
    assert float(shown[-1]["newton/step_norm"]) > 0
    assert [key for key in shown[-1] if key.startswith("newton/")] == ["newton/step_norm"]


def test_the_bar_is_left_alone_unless_asked(pl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bar, shown = bar_of(pl, "TQDMProgressBar", monkeypatch)
    fit(pl, NewtonLosses(), bar, enable_progress_bar=True)
    assert shown
    assert not any(key.startswith("newton/") for metrics in shown for key in metrics)


def test_what_tqdm_prints(pl: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fit(pl, NewtonLosses(prog_bar=True), enable_progress_bar=True)
    captured = capsys.readouterr()
    assert "newton/step_norm=" in captured.out + captured.err or "newton/step_norm:" in captured.out + captured.err


def test_prog_bar_alone_writes_nothing_to_the_logger(pl: Any, tmp_path: Path) -> None:
    table = importlib.import_module(f"{pl.__name__}.loggers").CSVLogger(tmp_path)
    fit(pl, NewtonLosses(prog_bar=True, log=False), logger=table)
    text = (Path(table.log_dir) / "metrics.csv").read_text()
    assert "loss" in text
    assert "newton/" not in text


def test_prog_bar_is_a_flag() -> None:
    with pytest.raises(ArgumentTypeError, match="prog_bar must be True or False; got 'yes'"):
        NewtonLosses(prog_bar="yes")  # type: ignore[arg-type]
