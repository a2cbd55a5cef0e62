"""A wrong value fails where the user writes it, with a message that says what would be right."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from typing import Any

import pytest
import torch
from tests.cases import Functional
from tests.lightning.fits import Batches, batches_of, case_module, classifier_module, plain_module, trainer

import newton_plugin as npl
from newton_plugin_lightning import LightningMissingError, NewtonLosses, _bases

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"curvature": "fischer"}, ValueError, r"curvature must be .*'fisher'.*got 'fischer'"),
    ({"structure": "dense"}, ValueError, r"structure must be one of 'auto', 'mean'.*got 'dense'"),
    ({"damping": 0}, ValueError, r"damping must be positive.*got 0"),
    ({"damping": -1.0}, ValueError, r"damping must be positive.*got -1\.0"),
    ({"damping": "low"}, ValueError, r"damping must be a positive number, 'auto'.*got 'low'"),
    ({"power": 2}, ValueError, r"power must be one of 1\.0, 0\.5.*got 2"),
    ({"reduction": "none"}, ValueError, r"reduction must be.*got 'none'"),
    ({"boundary": ""}, ValueError, r"boundary must be 'auto' or name"),
    ({"boundary": 3}, TypeError, r"boundary must be a name or a list of names; got 3"),
    ({"feature_dims": "last"}, TypeError, r"feature_dims must be None, an integer"),
    ({"start_step": -1}, ValueError, r"start_step must be 0 .* or positive; got -1"),
    ({"start_step": 1.5}, TypeError, r"start_step must be .*an integer; got 1\.5 of type float"),
    ({"start_step": True}, TypeError, r"start_step must be .*an integer; got True of type bool"),
    ({"log": "yes"}, TypeError, r"log must be True or False; got 'yes'"),
    ({"sync": None}, TypeError, r"sync must be True, False or 'lagged'; got None"),
    ({"sync": "late"}, ValueError, r"sync must be one of True, False, 'lagged'; got 'late'"),
    ({"sync": "lagged", "structure": "mean"}, ValueError, r"sync='lagged' takes .*structure='mean'"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WRONG, ids=lambda v: str(v)[:40])
def test_wrong_values(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        NewtonLosses(**arguments)
    assert isinstance(caught.value, npl.NewtonPluginError)


def test_the_signature_is_the_public_one() -> None:
    parameters = inspect.signature(NewtonLosses).parameters
    assert {k: p.default for k, p in parameters.items()} == {
        "curvature": "fisher",
        "damping": "auto",
        "structure": "auto",
        "power": 1,
        "reduction": "mean",
        "boundary": "auto",
        "feature_dims": None,
        "start_step": 0,
        "stop_step": None,
        "enabled": True,
        "sync": True,
        "compile_step": False,
        "log": True,
        "log_figures_every_n_steps": None,
        "prog_bar": False,
    }
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())


def test_instances_are_accepted(pl: Any) -> None:
    newton = NewtonLosses(curvature=npl.EmpiricalFisher(), damping=npl.AutoDamping(ratio=1.0))
    trainer(pl, newton).fit(case_module(pl, Functional), Batches(batches_of(Functional, 2)))


def test_a_boundary_that_the_model_does_not_have(pl: Any) -> None:
    with pytest.raises(npl.ArgumentError, match="encodre"):
        trainer(pl, NewtonLosses(boundary="model.encodre")).fit(
            classifier_module(pl), Batches(batches_of(Functional, 1))
        )


def test_layers_made_in_the_modules_own_setup_can_be_named(pl: Any) -> None:
    """Lightning calls ours before the module's, so names are looked up at the first step."""

    def setup(self: Any, stage: str) -> None:
        self.late = torch.nn.Linear(3, 3).double()

    def training_step(self: Any, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.late(self.model(batch[0])), batch[1])

    module = case_module(pl, Functional, setup=setup, training_step=training_step)
    newton = NewtonLosses(boundary="late")
    trainer(pl, newton).fit(module, Batches(batches_of(Functional, 1)))
    assert newton.hook.diagnostics()["step_norm"] > 0


def test_a_loss_without_outputs_fails_at_the_first_step(pl: Any) -> None:
    module = plain_module(pl, torch.nn.Linear(1, 1), lambda model, batch: model.weight.sum() + model.bias.sum())
    with pytest.raises(npl.NoBoundaryError, match=r"found no outputs.*Name the submodule"):
        trainer(pl, NewtonLosses()).fit(module, Batches([0]))


def test_a_detached_loss_says_so(pl: Any) -> None:
    module = plain_module(pl, torch.nn.Linear(1, 1), lambda model, batch: model.weight.sum().detach())
    with pytest.raises(npl.NoGradientError, match="no autograd graph"):
        trainer(pl, NewtonLosses()).fit(module, Batches([0]))


def test_two_in_one_trainer_are_refused(pl: Any) -> None:
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `NewtonLosses`"):
        trainer(pl, NewtonLosses(), NewtonLosses())


def test_at_home_in_every_installed_lightning(pl: Any) -> None:
    assert isinstance(NewtonLosses(), pl.Callback)


class TestBases:
    def test_one_tree_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for present, absent in (_bases.TREES, _bases.TREES[::-1]):
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, absent, None)
                assert _bases.installed_callbacks() == (importlib.import_module(present).Callback,)
                assert _bases.first_tree() == present

    def test_both_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for tree in _bases.TREES:
            monkeypatch.setitem(sys.modules, tree, None)
        with pytest.raises(LightningMissingError, match=r"pip install 'newton-plugin\[lightning\]'"):
            _bases.installed_callbacks()

    def test_a_broken_install_is_not_taken_for_a_missing_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(name: str) -> Any:
            raise ModuleNotFoundError("No module named 'torchmetrics'", name="torchmetrics")

        monkeypatch.setattr(_bases.importlib, "import_module", broken)
        with pytest.raises(ModuleNotFoundError, match="torchmetrics"):
            _bases.installed_callbacks()


@pytest.mark.slow
@pytest.mark.parametrize("absent", _bases.TREES)
def test_imports_and_fits_with_one_lightning_only(absent: str) -> None:
    code = f"""
import sys
sys.modules[{absent.split(".")[0]!r}] = None
from newton_plugin_lightning import NewtonLosses, _bases
assert len(_bases.installed_callbacks()) == 1
assert sys.modules.get({absent!r}) is None
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
