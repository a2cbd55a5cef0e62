"""Trainer settings that change what happens around the step: the same as the hook in a plain loop, to the bit."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from tests.cases import Functional, TwoHeads
from tests.lightning.fits import Batches, batches_of, case_module, moved, parameters, surrogate_gradients, trainer
from tests.lightning.test_exact import callback, worst
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin_lightning import NewtonLosses

PRECISIONS = ["64-true", "32-true", "bf16-mixed", "16-mixed"]


def of_dtype(batches: list[Any], dtype: torch.dtype) -> list[Any]:
    return [tuple(b.to(dtype) if b.is_floating_point() else b for b in batch) for batch in batches]


def scaler_for(precision: str) -> torch.amp.GradScaler | None:
    return torch.amp.GradScaler("cpu", init_scale=65536.0) if precision == "16-mixed" else None


def plain_loop(model: Any, batches: list[Any], precision: str, accumulate: int, clip: tuple[str, float] | None) -> None:
    """A plain loop that does what the Trainer does, with the one line of the hook."""
    hook, scaler = npl.LossHook(damping="auto"), scaler_for(precision)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    hook.set_optimizer(optimizer)
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    for k, (x, t) in enumerate(batches):
        with torch.autocast("cpu", dtype=mixed) if mixed else contextlib.nullcontext():
            loss = hook(model.loss(model(x), t)) / accumulate
        (scaler.scale(loss) if scaler else loss).backward()
        if (k + 1) % accumulate:
            continue
        if scaler:
            scaler.unscale_(optimizer)
        if clip and clip[0] == "norm":
            nn.utils.clip_grad_norm_(model.parameters(), clip[1])
        elif clip:
            nn.utils.clip_grad_value_(model.parameters(), clip[1])
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("clip", [None, ("norm", 0.05), ("value", 0.01)], ids=["no clipping", "norm", "value"])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_accumulation_and_clipping(
    pl: Any, precision: str, accumulate: int, clip: tuple[str, float] | None
) -> None:
    dtype = torch.float64 if precision == "64-true" else torch.float32
    batches = of_dtype(batches_of(TwoHeads, 8), dtype)
    twin = case_module(pl, TwoHeads).to(dtype)
    plain_loop(twin.model, batches, precision, accumulate, clip)

    options: dict[str, Any] = {"precision": precision}
    if precision == "16-mixed":  # on a CPU the Trainer's own choice would silently be bf16
        options = {"plugins": pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler_for(precision))}
    if clip:
        options |= {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]}
    module = case_module(pl, TwoHeads).to(dtype)
    before = parameters(module)
    trainer(pl, NewtonLosses(damping="auto"), accumulate_grad_batches=accumulate, **options).fit(
        module, Batches(batches)
    )
    assert all(map(torch.equal, parameters(module), parameters(twin)))
    assert not all(map(torch.equal, parameters(module), before))


def test_fast_dev_run(pl: Any) -> None:
    batches = batches_of(Functional, 3)
    module = case_module(pl, Functional)
    before = parameters(module)
    expected = surrogate_gradients(module.model, batches[:1], "fisher")
    trainer(pl, callback(), fast_dev_run=True).fit(module, Batches(batches))
    assert worst(moved(before, module), expected) <= 1e-10


def test_barebones(pl: Any) -> None:
    batches = batches_of(Functional, 1)
    module = case_module(pl, Functional, log=lambda *_, **__: None)
    before = parameters(module)
    expected = surrogate_gradients(module.model, batches, "fisher")
    none = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps")
    )
    trainer(pl, callback(), barebones=True, **none).fit(module, Batches(batches))
    assert worst(moved(before, module), expected) <= 1e-10


def test_gradient_checkpointing(pl: Any) -> None:
    """The trunk is computed again during backward; the hook's own pass must neither need nor disturb that."""

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        hidden = torch.utils.checkpoint.checkpoint(self.model.trunk, batch[0], use_reentrant=False)
        y = torch.utils.checkpoint.checkpoint(self.model.head, torch.tanh(hidden), use_reentrant=False)
        return self.model.loss(y, batch[1])

    batches = batches_of(Functional, 4)
    for curvature in ("fisher", "hessian"):
        module = case_module(pl, Functional, training_step=training_step)
        before = parameters(module)
        expected = surrogate_gradients(module.model, batches, curvature)
        trainer(pl, callback(curvature), accumulate_grad_batches=4).fit(module, Batches(batches))
        assert worst(moved(before, module), expected) <= 1e-10


def test_several_optimizers_on_one_loss(pl: Any) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        self.manual_backward(self.model.loss(self.model(batch[0]), batch[1]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self: Any) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=1.0) for part in (self.model.trunk, self.model.head)]

    batches = batches_of(Functional, 1)
    module = case_module(
        pl,
        Functional,
        training_step=training_step,
        configure_optimizers=configure_optimizers,
        automatic_optimization=False,
    )
    before = parameters(module)
    expected = surrogate_gradients(module.model, batches, "hessian")
    trainer(pl, callback("hessian")).fit(module, Batches(batches))
    assert worst(moved(before, module), expected) <= 1e-10


def test_the_batch_size_tuner_searches_with_the_callback_and_takes_everything_back(
    pl: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    tuner = importlib.import_module(f"{pl.__name__}.tuner").Tuner
    monkeypatch.chdir(tmp_path)
    sizes: list[int] = []

    class Data(pl.LightningDataModule):
        batch_size = 2

        def train_dataloader(self) -> Batches:
            sizes.append(self.batch_size)
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(self.batch_size, 4, generator=generator, dtype=torch.float64)
            return Batches([(x, torch.randint(0, 3, (self.batch_size,), generator=generator))] * 3)

    newton = NewtonLosses()
    module = case_module(pl, Functional)
    start = parameters(module)
    found = tuner(trainer(pl, newton, max_epochs=2)).scale_batch_size(
        module, datamodule=Data(), mode="power", max_trials=3, steps_per_trial=2
    )
    assert found >= max(sizes) >= 8  # older versions count the trial after the last
    assert all(map(torch.equal, parameters(module), start))
    assert "training_step" not in vars(module)
    assert not newton.hook.state_dict()["rules"]


def test_a_fit_inside_a_fit(pl: Any) -> None:
    """A training step that trains a small model of its own (distillation, a learned loss): each has its callback."""
    batches = batches_of(Functional, 2)
    inner_moves = []

    def training_step(self: Any, batch: Any, batch_idx: int) -> Tensor:
        inner = case_module(pl, Functional)
        before = parameters(inner)
        with torch.enable_grad():
            trainer(pl, callback()).fit(inner, Batches(batches[:1]))
        inner_moves.append(moved(before, inner))
        return self.model.loss(self.model(batch[0]), batch[1])

    module = case_module(pl, Functional, training_step=training_step)
    before = parameters(module)
    expected = surrogate_gradients(module.model, batches[:1], "fisher")
    trainer(pl, callback()).fit(module, Batches(batches[:1]))
    assert worst(moved(before, module), expected) <= 1e-10
    assert worst(inner_moves[0], expected) <= 1e-10


def test_one_callback_in_two_trainers(pl: Any) -> None:
    """One after the other on the same module it goes on; on another module it starts anew."""
    batches = batches_of(Functional, 4)
    newton, module = NewtonLosses(), case_module(pl, Functional)
    for half in (batches[:2], batches[2:]):
        trainer(pl, newton).fit(module, Batches(half))
    whole = case_module(pl, Functional)
    trainer(pl, NewtonLosses()).fit(whole, Batches(batches))
    assert all(map(torch.equal, parameters(module), parameters(whole)))

    again = case_module(pl, Functional)
    trainer(pl, newton).fit(again, Batches(batches))
    assert all(map(torch.equal, parameters(again), parameters(whole)))


def test_two_callbacks_in_one_trainer(pl: Any, tmp_path: Any) -> None:
    """A callback for each of two boundaries of one loss: both steps are taken, both states saved and found again.

    With a fixed damping that is what one callback does. Sizes of their own are what two callbacks ask for.
    """
    batches = batches_of(TwoHeads, 2)
    one, two = case_module(pl, TwoHeads), case_module(pl, TwoHeads)
    trainer(pl, NewtonLosses(damping=0.1)).fit(one, Batches(batches))
    pair = [NewtonLosses(boundary="model.head", damping=0.1), NewtonLosses(boundary="model.second", damping=0.1)]
    fit = trainer(pl, *pair)
    fit.fit(two, Batches(batches))
    assert worst(parameters(two), parameters(one)) <= 1e-10

    fit.save_checkpoint(tmp_path / "two.ckpt")
    keys = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]
    assert [k for k in keys if "Newton" in k] == [
        "NewtonLosses{'boundary': 'model.head'}",
        "NewtonLosses{'boundary': 'model.second'}",
    ]
    with pytest.raises(RuntimeError, match="more than one stateful callback"):  # Lightning's own
        trainer(pl, NewtonLosses(), NewtonLosses())


def test_what_two_callbacks_claim_is_stepped_once(pl: Any) -> None:
    batches = batches_of(Functional, 1)
    module = case_module(pl, Functional)
    before = parameters(module)
    expected = surrogate_gradients(module.model, batches, "fisher")
    trainer(pl, callback(boundary="model.head"), callback(boundary="cross_entropy"), callback()).fit(
        module, Batches(batches)
    )
    assert worst(moved(before, module), expected) <= 1e-10
