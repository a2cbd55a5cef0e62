"""Nothing of the callback stays in the module: after a fit, after an error, in copies, and outside training."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.cases import Functional
from tests.lightning.fits import Batches, batches_of, case_module, classifier_module, moved, parameters, trainer
from torch import Tensor, nn

from newton_plugin_lightning import NewtonLosses
from newton_plugin_lightning._patch import MethodPatch

BOUNDARIES = ["auto", "model.encoder", "model.criterion"]


def hooks_of(module: nn.Module) -> list[int]:
    """How many hooks each submodule has, of any kind."""
    return [sum(len(v) for k, v in vars(m).items() if k.endswith("_hooks")) for m in module.modules()]


def attributes(module: Any) -> dict[str, Any]:
    """The instance dictionary without what Lightning itself sets during a fit."""
    lightnings = {"_trainer", "_hparams", "_current_fx_name", "_param_requires_grad_state", "losses"}
    return {k: v for k, v in vars(module).items() if k not in lightnings}


def raising_step(error: BaseException) -> Callable[..., Any]:
    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 1:
            raise error
        return self.model.criterion(self.model(batch[0]), batch[1])

    return training_step


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_fit_leaves_no_trace(pl: Any, boundary: str) -> None:
    module = classifier_module(pl)
    before, hooks = attributes(module), hooks_of(module)
    trainer(pl, NewtonLosses(boundary=boundary)).fit(module, Batches(batches_of(Functional, 2)))
    assert attributes(module) == before
    assert "training_step" not in vars(module)
    assert "__getstate__" not in vars(module)
    assert hooks_of(module) == hooks


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_an_exception_leaves_no_trace(pl: Any, boundary: str) -> None:
    module = classifier_module(pl, training_step=raising_step(ZeroDivisionError("the user's own")))
    before, hooks = attributes(module), hooks_of(module)
    with pytest.raises(ZeroDivisionError, match="the user's own"):
        trainer(pl, NewtonLosses(boundary=boundary)).fit(module, Batches(batches_of(Functional, 2)))
    assert attributes(module) == before
    assert hooks_of(module) == hooks


class RaisesInBackward(torch.autograd.Function):
    """The identity below the outputs, whose backward fails once the step is on its way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ZeroDivisionError("in backward")


def test_an_exception_in_backward_leaves_no_trace_and_the_next_fit_is_right(pl: Any) -> None:
    broken = [True]

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.model.encoder(batch[0])
        return self.model.criterion(self.model.head(RaisesInBackward.apply(hidden) if broken[0] else hidden), batch[1])

    batches = batches_of(Functional, 2)
    module = classifier_module(pl, training_step=training_step)
    before, hooks, start = attributes(module), hooks_of(module), parameters(module)
    newton = NewtonLosses(damping=0.05)
    with pytest.raises(ZeroDivisionError, match="in backward"):
        trainer(pl, newton).fit(module, Batches(batches))
    assert attributes(module) == before
    assert hooks_of(module) == hooks
    assert all(map(torch.equal, parameters(module), start))

    broken[0] = False
    twin = classifier_module(pl, training_step=training_step)
    trainer(pl, newton).fit(module, Batches(batches))
    trainer(pl, NewtonLosses(damping=0.05)).fit(twin, Batches(batches))
    assert all(map(torch.equal, parameters(module), parameters(twin)))


def test_an_interrupt_leaves_no_trace(pl: Any) -> None:
    module = classifier_module(pl, training_step=raising_step(KeyboardInterrupt()))
    before = attributes(module)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        trainer(pl, NewtonLosses()).fit(module, Batches(batches_of(Functional, 2)))
    assert attributes(module) == before


def test_setup_twice_wraps_once(pl: Any) -> None:
    """As when ``fit`` is called again: there is one wrapper, and one removal restores the method."""
    module, fit, newton = classifier_module(pl), trainer(pl), NewtonLosses()
    before = attributes(module)
    newton.setup(fit, module, "fit")
    first = vars(module)["training_step"]
    newton.setup(fit, module, "fit")
    assert vars(module)["training_step"].__wrapped__ == type(module).training_step.__get__(module)
    assert vars(module)["training_step"] is not first
    newton.teardown(fit, module, "fit")
    newton.teardown(fit, module, "fit")
    assert attributes(module) == before


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_other_stages_are_not_wrapped(pl: Any, stage: str) -> None:
    module = classifier_module(pl)
    before = attributes(module)
    NewtonLosses().setup(trainer(pl), module, stage)
    assert attributes(module) == before


def test_a_fit_after_a_fit(pl: Any) -> None:
    """One callback for two fits of one model: the running curvature goes on; another model begins afresh."""
    batches = Batches(batches_of(Functional, 3))

    def fits(newton: NewtonLosses, module: Any, times: int) -> list[Tensor]:
        for _ in range(times):
            trainer(pl, newton).fit(module, batches)
        return parameters(module)

    once = fits(NewtonLosses(), case_module(pl, Functional), 2)
    used = NewtonLosses()
    fits(used, case_module(pl, Functional), 1)
    again = fits(used, case_module(pl, Functional), 2)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    stateless = [NewtonLosses(), NewtonLosses()]
    module = case_module(pl, Functional)
    for newton in stateless:
        trainer(pl, newton).fit(module, batches)
    assert not all(torch.equal(a, b) for a, b in zip(once, parameters(module), strict=True))


class Evaluates:
    """Steps for a module that runs its own training_step in validation, test and predict."""

    @staticmethod
    def evaluate(self: Any, batch: Any, batch_idx: int) -> Tensor:
        value = self.training_step(batch, batch_idx)
        self.seen = [*getattr(self, "seen", []), value.item()]
        return value

    @staticmethod
    def train(self: Any, batch: Any, batch_idx: int) -> Tensor:
        return self.model.loss(self.model(batch[0]), batch[1])

    @classmethod
    def attributes(cls) -> dict[str, Any]:
        steps = dict.fromkeys(("validation_step", "test_step", "predict_step"), cls.evaluate)
        return {"training_step": cls.train, **steps}


def test_zero_effect_on_validation_test_and_predict(pl: Any) -> None:
    """Also where validation calls ``self.training_step``, which is wrapped at that moment."""
    batches = Batches(batches_of(Functional, 2))
    states, seen = [], []
    for evaluate in (False, True):
        module, newton = case_module(pl, Functional, **Evaluates.attributes()), NewtonLosses()
        fit = trainer(pl, newton, num_sanity_val_steps=2, limit_val_batches=1.0 if evaluate else 0, max_epochs=2)
        fit.fit(module, batches, batches)
        if evaluate:
            fit.validate(module, batches, verbose=False)
            fit.test(module, batches, verbose=False)
            fit.predict(module, batches)
            seen = module.seen
        states.append((parameters(module), newton.state_dict()))
    assert len(seen) == 2 * 6
    assert all(torch.equal(a, b) for a, b in zip(states[0][0], states[1][0], strict=True))
    assert repr(states[0][1]) == repr(states[1][1])


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_copies_made_during_a_fit_are_unpatched_and_independent(pl: Any, boundary: str) -> None:
    """What weight averaging does: copy the module in the middle, train the one, run the other."""
    copies: list[Any] = []

    class Copier(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            copies.append((copy.deepcopy(pl_module), parameters(pl_module)))
            copies.append((copy.copy(pl_module), None))

    module = classifier_module(pl)
    batches = batches_of(Functional, 2)
    trainer(pl, NewtonLosses(boundary=boundary), Copier()).fit(module, Batches(batches))
    assert len(copies) == 4
    for twin, weights in copies:
        assert "training_step" not in vars(twin)
        assert "manual_backward" not in vars(twin)
        assert "__getstate__" not in vars(twin)
        if weights is not None:
            loss = twin.model.criterion(twin(batches[0][0]), batches[0][1])
            gradients = torch.autograd.grad(loss, list(twin.parameters()))
            assert any(g.abs().max() > 0 for g in gradients)
            assert all(torch.equal(a, b) for a, b in zip(weights, parameters(twin), strict=True))


class Holder(nn.Linear):
    """Importable, so that it can be pickled."""

    def training_step(self, batch: Any) -> str:
        return f"mine {batch}"

    def manual_backward(self, loss: Any) -> None:
        """Nothing."""


class TestMethodPatch:
    def test_pickle_and_copies_see_the_module_as_it_was(self) -> None:
        holder = Holder(1, 1)
        patch = MethodPatch(holder, {"training_step": lambda original, batch: "ours " + original(batch)})
        assert holder.training_step(1) == "ours mine 1"
        for twin in (pickle.loads(pickle.dumps(holder)), copy.deepcopy(holder), copy.copy(holder)):
            assert twin.training_step(1) == "mine 1"
            assert vars(twin).keys() == vars(Holder(1, 1)).keys()
        patch.remove()
        assert holder.training_step(1) == "mine 1"
        assert vars(holder).keys() == vars(Holder(1, 1)).keys()

    def test_an_attribute_that_was_there_before_comes_back(self) -> None:
        holder = Holder(1, 1)
        theirs = holder.training_step = lambda batch: f"theirs {batch}"  # type: ignore[method-assign]
        patch = MethodPatch(holder, {"training_step": lambda original, batch: "ours " + original(batch)})
        assert holder.training_step(1) == "ours theirs 1"
        assert copy.copy(holder).training_step is theirs
        patch.remove()
        assert vars(holder)["training_step"] is theirs

    def test_a_wrapper_on_top_of_ours_survives_the_removal(self) -> None:
        holder = Holder(1, 1)
        patch = MethodPatch(holder, {"training_step": lambda original, batch: "ours " + original(batch)})
        inner = holder.training_step
        holder.training_step = lambda batch: "top " + inner(batch)  # type: ignore[method-assign]
        assert holder.training_step(1) == "top ours mine 1"
        patch.remove()
        assert holder.training_step(1) == "top mine 1"


def decorate(step: Callable[..., Any]) -> Callable[..., Any]:
    """A user's own decorator, which hides the signature from everyone who does not unwrap it."""

    @functools.wraps(step)
    def decorated(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    return decorated


@decorate
def step_without_index(self: Any, batch: Any) -> Tensor:
    return self.model.loss(self.model(batch[0]), batch[1])


def step_with_other_name(self: Any, batch: Any, number: int) -> Tensor:
    assert isinstance(number, int)
    return self.model.loss(self.model(batch[0]), batch[1])


@pytest.mark.parametrize("step", [step_without_index, step_with_other_name], ids=["decorated", "renamed"])
def test_signatures_are_read_through_the_wrapper(pl: Any, step: Callable[..., Any]) -> None:
    """Lightning passes ``batch_idx`` by signature, unwrapping once; a wrapped step must get the same arguments."""
    module = case_module(pl, Functional, training_step=step)
    before = parameters(module)
    trainer(pl, NewtonLosses()).fit(module, Batches(batches_of(Functional, 1)))
    assert any(m.abs().max() > 0 for m in moved(before, module))


def test_a_module_without_training_step_is_refused_by_lightning_itself(pl: Any) -> None:
    class Empty(pl.LightningModule):
        def configure_optimizers(self) -> None:
            """No optimizer."""

    with pytest.raises(Exception, match="No `training_step"):
        trainer(pl, NewtonLosses()).fit(Empty(), Batches([0]))


def test_the_callback_copies_and_pickles_without_the_fit(pl: Any) -> None:
    module, newton = classifier_module(pl), NewtonLosses(structure="isotropic")
    fit = trainer(pl, newton)
    fit.fit(module, Batches(batches_of(Functional, 2)))
    newton.setup(fit, module, "fit")
    for twin in (pickle.loads(pickle.dumps(newton)), copy.deepcopy(newton)):
        assert repr(twin.state_dict()) == repr(newton.state_dict())
        assert twin._patch is None
        twin.teardown(fit, module, "fit")
        assert "training_step" in vars(module), "the copy has nothing to remove"
    newton.teardown(fit, module, "fit")
    assert "training_step" not in vars(module)
