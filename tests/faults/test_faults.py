"""Every row of docs/faults.md, through every door: what the user sees, and that the rest is as it should be."""

from __future__ import annotations

import re
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from tests.faults.case import Fault
from tests.faults.doors import run
from tests.faults.promises import INTACT, make
from tests.faults.provocations import GOOD, Net
from tests.faults.table import BEGIN, END, FAULTS, PAGE, page
from tests.lightning.fits import Batches, plain_module, trainer
from torch import Tensor

import newton_plugin as npl
from newton_plugin_lightning import NewtonLosses

SCALER = "float16 overflow"


def marks(fault: Fault, door: str) -> Any:
    return pytest.mark.xfail(strict=True, reason=fault.known_issues[door]) if door in fault.known_issues else ()


ROWS = [
    pytest.param(fault, door, id=f"{fault.title}-{door}", marks=marks(fault, door))
    for fault in FAULTS
    if fault.title != SCALER
    for door in fault.doors
]


@pytest.mark.parametrize(("fault", "door"), ROWS)
def test_fault(fault: Fault, door: str) -> None:
    seen = fault.seen(door)
    outcome = run(door, make(fault), fault.loss, fault.batches, **fault.options)
    if seen.error is None:
        assert outcome.error is None
        assert outcome.fallbacks == seen.fallbacks
        plain = run("plain", make(fault), fault.loss, fault.batches)
        assert list(map(repr, outcome.values)) == list(map(repr, plain.values)), "the loss's value, NaN included"
    else:
        assert type(outcome.error) is seen.error
        assert isinstance(outcome.error, npl.NewtonPluginError)
        assert seen.message in str(outcome.error)
    if seen.warns:
        assert len(outcome.warnings) == 1, "one warning, not one a step"
        assert seen.message in outcome.warnings[0]
    else:
        assert outcome.warnings == []
    assert outcome.left_over == []
    for name in fault.intact:
        INTACT[name][1](fault, door, outcome)


def half_loss(y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y, t.argmax(-1))


def overflow_in_a_loop(door: str, scaler: Any, model: Net) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    hook, wrapped = npl.LossHook(), npl.newton_loss(half_loss)
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            y = model(GOOD[0].float())
            assert y.dtype == torch.float16
            loss = wrapped(y, GOOD[1]) if door == "newton_loss" else half_loss(y, GOOD[1])
            loss = hook(loss) if door == "LossHook" else loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()


def overflow_in_a_fit(scaler: Any, model: Net) -> None:
    module = plain_module(pl, model, lambda net, batch: half_loss(net(batch[0].float()), batch[1]))
    precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)  # type: ignore[attr-defined]
    trainer(pl, NewtonLosses(), plugins=precision).fit(module, Batches([GOOD, GOOD]))


@pytest.mark.parametrize("door", ["plain", *next(f for f in FAULTS if f.title == SCALER).doors])
def test_float16_overflow(door: str) -> None:
    """A scale of 2^24 overflows float16, one of 2^8 does not; with the plugin as without it."""
    for scale, skipped in ((2.0**24, True), (2.0**8, False)):
        torch.manual_seed(0)
        model = Net()
        before = [p.detach().clone() for p in model.parameters()]
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)  # type: ignore[attr-defined]
        if door == "NewtonLosses":
            overflow_in_a_fit(scaler, model)
        else:
            overflow_in_a_loop(door, scaler, model)
        still = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert still == skipped
        assert scaler.get_scale() == (scale / 4 if skipped else scale)
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_the_table_is_what_was_tested() -> None:
    """Write it anew by ``python -m tests.faults.table``."""
    text = PAGE.read_text()
    assert BEGIN in text
    assert END in text
    assert page(text) == text


def test_every_fault_is_one_row() -> None:
    titles = [fault.title for fault in FAULTS]
    assert len(set(titles)) == len(titles)
    assert all(fault.intact for fault in FAULTS)
    rows = re.findall(r"^\| (?!fault|-)(.*?) \|", PAGE.read_text(), re.MULTILINE)
    assert rows == titles
