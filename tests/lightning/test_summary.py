"""What is said at the end of a fit: its numbers against the definitions, and when nothing is said."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.cases import Functional
from tests.lightning.fits import Batches, batches_of, case_module, trainer
from torch import Tensor

import newton_plugin as npl
from newton_plugin_lightning import NewtonLosses
from newton_plugin_lightning._summary import over_time
from newton_plugin_lightning._vitals import MOST, Look, Vitals

TITLE = "NewtonLosses, over this fit"


@pytest.fixture
def said(pl: Any) -> Any:
    """The lines that a fit writes into Lightning's own log."""
    records: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    listener, log = Listener(), logging.getLogger(pl.__name__)
    level = log.level
    log.setLevel(logging.INFO)  # the demo, run by a test in the same process, leaves it at ERROR
    log.addHandler(listener)
    yield records
    log.removeHandler(listener)
    log.setLevel(level)


def lines(said: list[str]) -> dict[str, str]:
    """The summary, by the first word of a line."""
    (told,) = [text for text in said if TITLE in text]
    return {line[2:16].strip(): line[16:] for line in told.splitlines()[1:]}


def numbers(words: str) -> list[float]:
    return [float(word) for word in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", words)]


def fit(pl: Any, newton: NewtonLosses, batches: int = 8, **options: Any) -> Any:
    module = options.pop("module", None) or case_module(pl, Functional)
    run = trainer(pl, newton, **{"log_every_n_steps": 2, **options})
    run.fit(module, Batches(batches_of(Functional, batches)))
    return run


class _Bare:
    class LightningModule(torch.nn.Module):
        """Enough of a Lightning to make a module without one."""


def test_the_numbers_are_those_of_the_definitions(pl: Any, said: list[str]) -> None:
    """Batches of twelve samples, since a tenth of fewer than ten is none."""
    small = batches_of(Functional, 16)
    batches = [tuple(torch.cat(pair) for pair in zip(*small[k : k + 2], strict=True)) for k in range(0, 16, 2)]
    run = trainer(pl, NewtonLosses(damping=1e12), log_every_n_steps=2)  # steps of 1e-12 g: the weights stay
    run.fit(case_module(pl, Functional), Batches(batches))
    model, norms, tails, spreads = case_module(_Bare, Functional).model, [], [], []
    for x, t in (batches[k] for k in (0, 1, 3, 5, 7)):  # the first, and every second
        y = model(x).detach().requires_grad_()
        g = torch.autograd.grad(model.loss(y, t), y)[0].flatten(1) * len(y)
        squared = g.square().sum(1)
        norms.append(float(squared.mean().sqrt()))
        tails.append(float(squared.max() / squared.sum()))
        values = torch.linalg.eigvalsh(g.mT @ g / len(g))
        spreads.append(float(values.max() / values[values > 1e-9 * values.max()].mean()))
    told, middle = lines(said), sorted(norms)[2]
    assert numbers(told["sizes"]) == pytest.approx([middle, middle * 1e-12, 5], rel=5e-3)
    for name, course in (("tail", tails), ("spread", spreads)):
        early, late = (sum(pair) / 2 for pair in (course[:2], course[3:]))
        assert numbers(told[name]) == pytest.approx([early, course[2], late], rel=5e-3)


@pytest.mark.parametrize("structure", ["isotropic", "gated", "mean"])
def test_counts_places_and_readings(pl: Any, said: list[str], structure: Any) -> None:
    newton = NewtonLosses(structure=structure, start_step=2, stop_step=7)
    fit(pl, newton, 10)
    told = lines(said)
    assert told["steps"] == "5 batches took a step, 5 stayed plain; 0 fallbacks so far"
    assert told["where"] == "; ".join(map(str, newton.hook.boundaries))
    assert ("gate" in told) == ("signal" in told) == (structure == "gated")
    assert re.fullmatch(r".* ms a batch in the hook and its part of the backward pass.*", told["host time"])


@pytest.mark.parametrize("arguments", [{"enabled": False}, {"start_step": 100}], ids=str)
def test_a_fit_without_a_step_says_so(pl: Any, said: list[str], arguments: dict[str, Any]) -> None:
    fit(pl, NewtonLosses(**arguments), 3)
    assert any("NewtonLosses took no step in 3 batches: it was not enabled" in text for text in said)


def test_fallbacks_are_counted(pl: Any, said: list[str]) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        loss = self.model.loss(self.model(batch[0]), batch[1])
        return loss * (float("nan") if batch_idx == 1 else 1.0) if batch_idx < 2 else loss

    fit(pl, NewtonLosses(), 2, module=case_module(pl, Functional, training_step=training_step))
    assert lines(said)["steps"] == "2 batches took a step, 0 stayed plain; 1 fallbacks so far"


def test_manual_optimization(pl: Any, said: list[str]) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.model.loss(self.model(batch[0]), batch[1]))
        optimizer.step()

    module = case_module(pl, Functional, training_step=training_step, automatic_optimization=False)
    fit(pl, NewtonLosses(), 6, module=module)
    told = lines(said)
    assert told["steps"].startswith("6 batches took a step")
    assert numbers(told["sizes"])[-1] == 4


@pytest.mark.parametrize(
    "make", [lambda: (NewtonLosses(log=False), {}), lambda: (NewtonLosses(), {"barebones": True})], ids=["log", "bare"]
)
def test_nothing_is_said_or_kept(pl: Any, said: list[str], make: Callable[[], Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(Look, "take", lambda *args: pytest.fail("nobody asked"))
    newton, options = make()
    if options:
        module = case_module(pl, Functional, log=lambda *a, **k: None)
        run = pl.Trainer(barebones=True, max_epochs=1, callbacks=[newton], accelerator="cpu")
        run.fit(module, Batches(batches_of(Functional, 3)))
    else:
        fit(pl, newton, 3)
    assert newton.hook.boundaries
    assert not any(TITLE in text for text in said)


def test_looks_are_read_when_training_has_ended(pl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until then they are tensors: to read one waits for the device."""
    read: list[int] = []
    original = Look.read

    def reading(self: Look) -> dict[str, float]:
        read.append(run.global_step)
        return original(self)

    monkeypatch.setattr(Look, "read", reading)
    run = trainer(pl, NewtonLosses(), log_every_n_steps=1)
    run.fit(case_module(pl, Functional), Batches(batches_of(Functional, 5)))
    assert read == [5] * 5


def test_a_look_launches_operations_and_reads_none() -> None:
    """On the meta device a tensor has no value: to read one is an error."""
    hook = npl.LossHook()
    hook(torch.nn.Linear(3, 2)(torch.randn(12, 3)).square().mean()).backward()
    (last,) = hook.last_steps
    assert last.gradients is not None
    meta = {k: v.to("meta") for k, v in vars(last).items() if isinstance(v, Tensor)}
    look = Look(0)
    look.take([dataclasses.replace(last, **meta, readings={})])
    assert {"gradient_square", "step_square", "tail"} <= look.numbers.keys()
    assert all(value.is_meta for values in look.numbers.values() for value in values)
    with pytest.raises(NotImplementedError, match="meta"):
        look.read()


def test_a_long_fit_keeps_a_few_looks_evenly() -> None:
    vitals = Vitals()
    steps = 10_000
    for step in range(steps):
        if vitals.due(step, 10):
            vitals.look(step)
    kept = [look.step for look in vitals.looks]
    assert MOST // 2 <= len(kept) <= MOST
    gaps = {b - a for a, b in pairwise(kept[1:])}
    assert len(gaps) == 1
    assert kept[0] == 0
    assert kept[-1] >= steps - 2 * gaps.pop()


def test_due_at_the_first_step_and_at_those_of_the_logger_once() -> None:
    vitals = Vitals()
    assert [step for step in (0, 0, 1, 2, 3, 3, 4, 7, 8) if vitals.due(step, 4)] == [0, 3, 7]
    never = Vitals()
    assert [step for step in range(10) if never.due(step, 0)] == [0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([], ""),
        ([float("nan")], ""),
        ([0.25], "0.25"),
        ([0.25, 0.5], "0.25, then 0.5"),
        ([1, float("nan"), 2, 3], "1 early, 2 in the middle, 3 late"),
        ([1, 1, 2, 2, 3, 9, 9], "1 early, 2 in the middle, 9 late"),
    ],
    ids=str,
)
def test_words_for_a_course(values: list[float], words: str) -> None:
    assert over_time(values) == words
