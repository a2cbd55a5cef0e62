"""``enabled`` and ``stop_step``: a running module is switched without a trace, and the running curvature is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.cases import Functional
from tests.lightning.fits import Batches, batches_of, case_module, classifier_module, parameters, trainer
from tests.lightning.test_removal import hooks_of
from tests.lightning.test_state import equal
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin_lightning import NewtonLosses

BOUNDARIES = ["auto", "model.encoder", "model.criterion"]
BATCHES = 6


class Recorder:
    """What the module looked like, and where its parameters were, in every batch."""

    def __init__(self, pl: Any, newton: NewtonLosses | None = None, switch: dict[int, bool] | None = None) -> None:
        recorder = self
        self.weights: list[list[Tensor]] = []
        self.hooks: list[list[int]] = []

        class Record(pl.Callback):
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                if newton is not None and switch is not None and batch_idx in switch:
                    newton.enabled = switch[batch_idx]

            def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
                recorder.hooks.append(hooks_of(pl_module))

            def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
                recorder.weights.append(parameters(pl_module))

        self.callback = Record()


def plain_step(weights: list[Tensor], batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    """One step of SGD with rate 1 from these weights, written out."""
    module = classifier_module(_Lightning)
    with torch.no_grad():
        for parameter, weight in zip(module.parameters(), weights, strict=True):
            parameter.copy_(weight)
    loss = module.model.criterion(module.model(batch[0]), batch[1])
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    return [w - g for w, g in zip(weights, gradients, strict=True)]


class _Lightning:
    """Enough of a Lightning to make a module without one."""

    class LightningModule(nn.Module):
        def log(self, *args: Any, **kwargs: Any) -> None:
            """Nothing."""


def fit(pl: Any, newton: NewtonLosses, switch: dict[int, bool] | None = None) -> tuple[Recorder, list[bool], Any]:
    """A fit, and for every batch whether it was a plain step."""
    batches, module = batches_of(Functional, BATCHES), classifier_module(pl)
    recorder, start = Recorder(pl, newton, switch), parameters(module)
    trainer(pl, newton, recorder.callback).fit(module, Batches(batches))
    plain = []
    for before, after, batch in zip([start, *recorder.weights], recorder.weights, batches, strict=False):
        expected = plain_step(before, batch)
        plain.append(all(torch.allclose(a, e, atol=1e-12) for a, e in zip(after, expected, strict=True)))
    return recorder, plain, module


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_from_start_to_stop(pl: Any, boundary: str) -> None:
    recorder, plain, module = fit(pl, NewtonLosses(structure="isotropic", boundary=boundary, start_step=1, stop_step=4))
    assert plain == [True, False, False, False, True, True]
    bare = hooks_of(classifier_module(pl))
    assert [hooks == bare for hooks in recorder.hooks if boundary == "model.encoder"] == (
        plain if boundary == "model.encoder" else []
    )
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_switched_while_it_runs(pl: Any, boundary: str) -> None:
    newton = NewtonLosses(structure="isotropic", boundary=boundary)
    _, plain, _ = fit(pl, newton, {2: False, 5: True})
    assert plain == [False, False, True, True, True, False]


@pytest.mark.parametrize("structure", ["isotropic", "gated"])
def test_the_state_is_kept_while_it_is_off(pl: Any, structure: Any) -> None:
    """The running curvature is that of the batches that took a step, and no other."""
    once, twice = NewtonLosses(structure=structure, stop_step=3), NewtonLosses(structure=structure)
    fit(pl, once)
    fit(pl, twice, {3: False})
    assert equal(once.state_dict(), twice.state_dict())
    assert once.hook.diagnostics()["step_norm"] > 0


def test_never_enabled_nothing_is_asked_of_the_model(pl: Any) -> None:
    newton = NewtonLosses(boundary="no.such.layer", enabled=False)
    _, plain, _ = fit(pl, newton)
    assert plain == [True] * BATCHES
    assert newton.hook.diagnostics() == {}


def test_a_wrong_name_is_refused_before_the_step_that_needs_it(pl: Any) -> None:
    with pytest.raises(npl.ArgumentError, match="encodre"):
        fit(pl, NewtonLosses(boundary="model.encodre", start_step=100))


def test_in_manual_optimization_each_optimizer_step_counts(pl: Any) -> None:
    """Also within a batch."""
    taken: list[int] = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        for _ in range(2):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.model.loss(self.model(batch[0]), batch[1]))
            optimizer.step()

    newton = NewtonLosses(start_step=1, stop_step=5)
    hook = newton.hook

    class Counting:
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            taken.append(run.global_step)
            return hook(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(hook, name)

    newton.hook = Counting()  # type: ignore[assignment]
    run = trainer(pl, newton)
    module = case_module(pl, Functional, training_step=training_step, automatic_optimization=False)
    run.fit(module, Batches(batches_of(Functional, 4)))
    assert taken == [1, 2, 3, 4]


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"stop_step": 0}, ValueError, r"stop_step must be larger than start_step=0; got 0.*enabled=False"),
    ({"start_step": 5, "stop_step": 5}, ValueError, r"stop_step must be larger than start_step=5; got 5"),
    ({"stop_step": 2.0}, TypeError, r"stop_step must be .* an integer, or None; got 2\.0 of type float"),
    ({"stop_step": True}, TypeError, r"stop_step must be .*; got True of type bool"),
    ({"enabled": 1}, TypeError, r"enabled must be True or False; got 1 of type int"),
    ({"log_figures_every_n_steps": 0}, ValueError, r"log_figures_every_n_steps must be a positive .*; got 0"),
    ({"log_figures_every_n_steps": "often"}, TypeError, r"log_figures_every_n_steps must be .*; got 'often'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_wrong_values(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        NewtonLosses(**arguments)
    assert isinstance(caught.value, npl.NewtonPluginError)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({}, ""),
        ({"curvature": "fisher", "power": 1, "log": True}, ""),
        ({"structure": "mean", "start_step": 5}, "structure='mean', start_step=5"),
        ({"damping": 0.1, "boundary": ["a", "b"]}, "damping=0.1, boundary=['a', 'b']"),
        ({"enabled": False, "log": False, "prog_bar": True}, "enabled=False, prog_bar=True, log=False"),
        ({"curvature": npl.Hessian()}, "curvature=Hessian(structure='mean', power=1)"),
        ({"log_figures_every_n_steps": 50, "stop_step": 9}, "stop_step=9, log_figures_every_n_steps=50"),
    ],
    ids=str,
)
def test_repr_shows_what_differs_from_the_defaults(arguments: dict[str, Any], shown: str) -> None:
    assert repr(NewtonLosses(**arguments)) == f"NewtonLosses({shown})"


def test_repr_shows_what_was_switched_since() -> None:
    newton = NewtonLosses()
    newton.enabled = False
    assert repr(newton) == "NewtonLosses(enabled=False)"
