"""Checkpoints, resuming, and the tools of Lightning that train and take everything back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cases import Functional
from tests.lightning.fits import Batches, batches_of, case_module, parameters, trainer
from torch import Tensor

from newton_plugin_lightning import NewtonLosses

PLAIN = (str, int, float, bool, type(None))


def plain_types(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, (str, int)) and plain_types(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain_types, value))
    return isinstance(value, Tensor) or type(value) in PLAIN


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def saved(pl: Any, newton: NewtonLosses, path: Path, batches: int = 3) -> Any:
    module = case_module(pl, Functional)
    fit = trainer(pl, newton)
    fit.fit(module, Batches(batches_of(Functional, batches)))
    fit.save_checkpoint(path)
    return module


def test_the_state_is_plain_and_loads_with_weights_only(pl: Any, tmp_path: Path) -> None:
    newton = NewtonLosses()
    saved(pl, newton, tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["NewtonLosses"]
    assert plain_types(state)
    assert equal(state, newton.state_dict())
    assert any(isinstance(v, Tensor) for rule in state["hook"]["rules"].values() for v in _leaves(rule))


def test_a_subclass_has_a_state_of_its_own() -> None:
    class Mine(NewtonLosses):
        """A user's own."""

    assert NewtonLosses().state_key == "NewtonLosses"
    assert Mine().state_key.endswith("Mine")
    assert Mine(boundary="head").state_key.endswith("Mine{'boundary': 'head'}")


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in _leaves(v)]
    return [value]


def test_resuming_equals_not_stopping(pl: Any, tmp_path: Path) -> None:
    """The running mean of C comes back with the checkpoint."""
    batches = batches_of(Functional, 3)
    whole = case_module(pl, Functional)
    trainer(pl, NewtonLosses(), max_epochs=2).fit(whole, Batches(batches))
    for newton, same in ((NewtonLosses(), True), (_Forgetful(), False)):
        half = case_module(pl, Functional)
        fit = trainer(pl, newton)
        fit.fit(half, Batches(batches))
        fit.save_checkpoint(tmp_path / "half.ckpt")
        resumed = case_module(pl, Functional)
        trainer(pl, type(newton)(), max_epochs=2).fit(
            resumed, Batches(batches), ckpt_path=str(tmp_path / "half.ckpt"), **_weights_only(pl)
        )
        difference = [torch.equal(a, b) for a, b in zip(parameters(whole), parameters(resumed), strict=True)]
        assert all(difference) == same


def _weights_only(pl: Any) -> dict[str, Any]:
    import inspect

    return {"weights_only": True} if "weights_only" in inspect.signature(pl.Trainer.fit).parameters else {}


class _Forgetful(NewtonLosses):
    """Restores nothing, to show that the test above can fail."""

    @property
    def state_key(self) -> str:
        return "NewtonLosses"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing."""


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_checkpoint_resumes_without_the_callback(pl: Any, tmp_path: Path) -> None:
    module = saved(pl, NewtonLosses(), tmp_path / "a.ckpt")
    other = case_module(pl, Functional)
    trainer(pl, max_epochs=1).fit(
        other, Batches(batches_of(Functional, 3)), ckpt_path=str(tmp_path / "a.ckpt"), **_weights_only(pl)
    )
    assert all(torch.equal(a, b) for a, b in zip(parameters(module), parameters(other), strict=True))


def test_the_learning_rate_finder_searches_with_the_callback_and_takes_everything_back(
    pl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It replaces ``trainer.callbacks`` but keeps the wrapped step; afterwards nothing of the search is left."""
    import importlib

    tuner = importlib.import_module(f"{pl.__name__}.tuner").Tuner
    monkeypatch.chdir(tmp_path)  # it saves a checkpoint into the working directory

    def configure_optimizers(self: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    losses = []
    for newton in (NewtonLosses(structure="isotropic"), None):
        module = case_module(pl, Functional, configure_optimizers=configure_optimizers, lr=0.01)
        start = parameters(module)
        fit = trainer(pl, *([newton] if newton else []), max_epochs=10, default_root_dir=tmp_path)
        batches = Batches(batches_of(Functional, 30))
        finder = tuner(fit).lr_find(module, batches, num_training=20, min_lr=1e-3, max_lr=1.0, update_attr=False)
        losses.append(finder.results["loss"])
        assert all(torch.equal(a, b) for a, b in zip(start, parameters(module), strict=True))
        assert "training_step" not in vars(module)
        if newton:
            assert equal(newton.state_dict(), NewtonLosses().state_dict())
    assert losses[0] != losses[1]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")
def test_stochastic_weight_averaging(pl: Any, first: bool) -> None:
    """It deep-copies the module in ``setup``, before or after us, and ends with an epoch without backward."""
    averaging = pl.callbacks.StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    callbacks = [NewtonLosses(), averaging] if first else [averaging, NewtonLosses()]
    module = case_module(pl, Functional)
    trainer(pl, *callbacks, max_epochs=3).fit(module, Batches(batches_of(Functional, 3)))
    assert "training_step" not in vars(module)
    assert all(p.isfinite().all() for p in module.parameters())
