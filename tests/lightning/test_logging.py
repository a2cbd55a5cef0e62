"""Diagnostics go through the Trainer's own logger, at the steps at which it writes and at no others."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
from tests.cases import Functional
from tests.lightning.fits import Batches, batches_of, case_module, trainer

from newton_plugin_lightning import NewtonLosses

KEYS = {"gradient_norm", "step_norm", "eig_min", "eig_max", "damping", "fallbacks"}


def logged(pl: Any, path: Path, newton: NewtonLosses, batches: int = 12, **options: Any) -> list[dict[str, str]]:
    """The rows of the CSV that Lightning's logger wrote, without empty cells."""
    import csv

    module = options.pop("module", None) or case_module(pl, Functional)
    logger = importlib.import_module(f"{pl.__name__}.loggers").CSVLogger(path)
    fit = trainer(pl, newton, logger=logger, **{"log_every_n_steps": 4, **options})
    fit.fit(module, Batches(batches_of(Functional, batches)))
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def newton_steps(rows: list[dict[str, str]]) -> list[int]:
    return [int(row["step"]) for row in rows if any(k.startswith("newton/") for k in row)]


def test_diagnostics_at_every_nth_step(pl: Any, tmp_path: Path) -> None:
    rows = logged(pl, tmp_path, NewtonLosses())
    assert newton_steps(rows) == [3, 7, 11]
    values = {k.removeprefix("newton/"): float(v) for k, v in rows[-1].items() if k.startswith("newton/")}
    assert values.keys() == KEYS
    assert values["gradient_norm"] > 0
    assert values["eig_min"] + 1e-12 >= 0
    assert values["eig_max"] > 0
    assert values["damping"] > 0
    assert values["fallbacks"] == 0
    assert "loss" in rows[-1]


def test_with_accumulation_at_every_nth_optimizer_step(pl: Any, tmp_path: Path) -> None:
    rows = logged(pl, tmp_path, NewtonLosses(), log_every_n_steps=2, accumulate_grad_batches=3)
    assert newton_steps(rows) == [1, 3]


def test_diagnostics_in_manual_optimization(pl: Any, tmp_path: Path) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.model.loss(self.model(batch[0]), batch[1]))
        optimizer.step()

    module = case_module(pl, Functional, training_step=training_step, automatic_optimization=False)
    assert len(newton_steps(logged(pl, tmp_path, NewtonLosses(), module=module))) == 3


def test_nothing_before_start_step(pl: Any, tmp_path: Path) -> None:
    assert newton_steps(logged(pl, tmp_path, NewtonLosses(start_step=6))) == [7, 11]


def test_log_false(pl: Any, tmp_path: Path) -> None:
    rows = logged(pl, tmp_path, NewtonLosses(log=False))
    assert rows
    assert newton_steps(rows) == []


@pytest.mark.parametrize(
    "options", [{}, {"barebones": True}, {"log_every_n_steps": 0}], ids=["no logger", "barebones", "never"]
)
def test_without_a_logger_nothing_is_read_from_the_device(
    pl: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    newton = NewtonLosses()
    monkeypatch.setattr(newton.hook, "diagnostics", lambda: pytest.fail("diagnostics wait for the device"))
    attributes: dict[str, Any] = {"log": lambda *a, **k: None} if options.get("barebones") else {}
    if options.get("barebones"):
        fit = pl.Trainer(barebones=True, max_epochs=1, callbacks=[newton], accelerator="cpu")
    else:
        fit = trainer(pl, newton, **options)
    module = case_module(pl, Functional, **attributes)
    fit.fit(module, Batches(batches_of(Functional, 60)))
