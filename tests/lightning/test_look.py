"""look under Lightning: what it says of a user's module, and that it leaves everything as it was."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.lightning.fits import Batches, plain_module, trainer
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin_lightning import NewtonLosses
from newton_plugin_lightning._look import look
from newton_plugin_lightning.cli import main

N, M, K = 16, 5, 3


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, N, M, generator=generator)
    return [(b, (b @ torch.ones(M, K).tril()).argmax(-1)) for b in x]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(M, 12), nn.BatchNorm1d(12), nn.Dropout(0.2), nn.ReLU(), nn.Linear(12, K))


def module_of(pl: Any, **attributes: Any) -> Any:
    return plain_module(pl, network(), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), **attributes)


def states() -> tuple[Any, ...]:
    numpy = np.random.get_state()  # noqa: NPY002
    return random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()


class Data:
    """A datamodule that makes its loader in setup, shuffled by torch's random state."""

    def __new__(cls, pl: Any) -> Any:
        class Module(pl.LightningDataModule):
            made = 0

            def setup(self, stage: str) -> None:
                self.made += 1
                self.rows = [(x, t) for batch in batches(40) for x, t in zip(*batch, strict=True)]

            def train_dataloader(self) -> Any:
                return torch.utils.data.DataLoader(self.rows, N, shuffle=True)

        return Module()


def test_module_trainer_data_and_random_states_are_as_before(pl: Any) -> None:
    module, data, own = module_of(pl), Data(pl), trainer(pl, NewtonLosses(), max_epochs=2)
    before, states_before = copy.deepcopy(module.state_dict()), states()
    attributes, trainer_before = dict(vars(module)), {k: v for k, v in vars(own).items() if not k.startswith("_")}
    callbacks, repr_before = list(own.callbacks), repr(own.callbacks[0])
    report = look(own, module, datamodule=data, steps=6, pairs=1)
    assert report.steps == 6
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert vars(module) == attributes
    assert all(p.grad is None for p in module.parameters())
    assert states() == states_before
    assert {k: v for k, v in vars(own).items() if not k.startswith("_")} == trainer_before
    assert (own.global_step, own.current_epoch, own.callbacks) == (0, 0, callbacks)
    assert repr(own.callbacks[0]) == repr_before
    assert own.callbacks[0].hook.boundaries == ()
    assert own.lightning_module is None
    assert (data.made, data.trainer) == (0, None)


def test_a_fit_afterwards_is_a_fit_without_it(pl: Any) -> None:
    def fitted(looked: bool) -> list[Tensor]:
        module = module_of(pl)
        own = trainer(pl, max_epochs=1)
        loader = torch.utils.data.DataLoader(
            [(x, t) for b in batches(6) for x, t in zip(*b, strict=True)],
            N,
            shuffle=True,
            generator=torch.Generator().manual_seed(3),
        )
        torch.manual_seed(5)
        if looked:
            look(own, module, loader, steps=3, pairs=0)
        own.fit(module, loader)
        return [p.detach() for p in module.parameters()]

    for ours, theirs in zip(fitted(True), fitted(False), strict=True):
        assert torch.equal(ours, theirs)


def test_the_steps_are_plain_ones(pl: Any) -> None:
    """What is seen of the third step is the gradient at the parameters of plain training."""
    module = module_of(pl, configure_optimizers=lambda self: torch.optim.Adam(self.parameters(), 0.05))
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    twin, data = copy.deepcopy(module.model), batches(3)
    report = look(trainer(pl), module, Batches(data), steps=3, pairs=0)
    optimizer = torch.optim.Adam(twin.parameters(), 0.05)
    for x, t in data:
        optimizer.zero_grad()
        y = twin(x)
        loss = F.cross_entropy(y, t)
        (g,) = torch.autograd.grad(loss, y, retain_graph=True)
        loss.backward()
        optimizer.step()
    (watched,) = report.watched.values()
    torch.testing.assert_close(watched.sizes(late=True), N * g.norm(dim=-1).double(), rtol=1e-4, atol=1e-6)
    (boundary,) = report.boundaries
    assert (boundary.name, boundary.shape, boundary.samples, boundary.features) == ("model.4", (N, K), N, K)
    assert boundary.last_layer == "a layer of 12 inputs and 3 outputs"


def test_the_loss_of_the_module_is_checked_on_a_real_batch(pl: Any) -> None:
    report = look(trainer(pl), module_of(pl), Batches(batches(20)), steps=12, pairs=0)
    checked = report.checks["model.4"].report
    assert checked is not None
    assert checked.name == "training_step"
    assert (checked.samples, checked.features) == (N, K)
    assert checked.gradient_differences.verdict == checked.hessian_differences.verdict == "agrees"
    assert checked.determinism.verdict == "deterministic", "what draws random numbers lies below the outputs"
    assert report.advice.take == "gated", "the optimizer is SGD"
    assert "not timed" in str(report)


def test_scores_that_a_view_makes_lists_are_seen_as_lists(pl: Any) -> None:
    """A scorer of one number for each item; the loss sees (N, n)."""
    torch.manual_seed(0)
    x = torch.randn(8, 10, 4, M)
    scorer = nn.Sequential(nn.Linear(M, 6), nn.Tanh(), nn.Linear(6, 1))

    def ranked(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch).squeeze(-1).logsumexp(-1) - batch[..., 0].mean(-1)).square().mean()

    report = look(trainer(pl), plain_module(pl, scorer, ranked), Batches(list(x)), steps=8, pairs=0)
    (boundary,) = report.boundaries
    checked = report.checks[boundary.name].report
    assert checked is not None
    assert (boundary.samples, boundary.features) == (checked.samples, checked.features) == (10, 4)
    assert checked.coupling.verdict == "independent"


def test_a_training_that_is_shorter_than_the_look(pl: Any) -> None:
    report = look(trainer(pl), module_of(pl), Batches(batches(4)), steps=30, pairs=5)
    assert (report.steps, report.cost) == (4, None)
    assert report.checks["model.4"].report is not None


def test_accumulated_batches_are_one_step(pl: Any) -> None:
    own = trainer(pl, max_epochs=-1, accumulate_grad_batches=2)
    report = look(own, module_of(pl), Batches(batches(8)), steps=3, pairs=2)
    assert report.steps == 6, "backward passes"
    assert report.cost is not None
    assert report.cost.pairs == 2
    assert 0.01 < report.cost.ratio < 100
    assert "NewtonLosses(" in report.cost.rule


def test_a_callback_of_the_trainers_is_the_one_that_is_timed(pl: Any) -> None:
    own = trainer(pl, NewtonLosses(structure="mean", damping=0.5), max_epochs=-1)
    report = look(own, module_of(pl), Batches(batches(8)), steps=2, pairs=1)
    assert report.cost is not None
    assert "structure='mean'" in report.cost.rule
    assert "damping=0.5" in report.cost.rule


def test_manual_optimization_is_looked_at_and_not_checked(pl: Any) -> None:
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        self.optimizers().zero_grad()
        self.manual_backward(F.cross_entropy(self.model(batch[0]), batch[1]))
        self.optimizers().step()

    module = module_of(pl, automatic_optimization=False, training_step=training_step)
    report = look(trainer(pl), module, Batches(batches(12)), steps=12, pairs=0)
    assert report.steps == 12
    assert "manual optimization" in report.checks["model.4"].why_not
    assert "was not possible: in manual optimization" in str(report)


def test_a_layer_that_is_called_twice_is_not_checked(pl: Any) -> None:
    def both(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) + F.cross_entropy(model(-batch[0]), batch[1])

    report = look(trainer(pl), plain_module(pl, network(), both), Batches(batches(3)), steps=3, pairs=0)
    assert {checked.why_not for checked in report.checks.values()} == {"'model.4' is called 2 times for one loss"}


def test_a_scheduler_that_waits_for_a_validation_does_not_stop_it(pl: Any) -> None:
    def configure_optimizers(self: Any) -> Any:
        optimizer = torch.optim.Adam(self.parameters())
        waiting = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": waiting, "monitor": "val_loss"}}

    module = module_of(pl, configure_optimizers=configure_optimizers)
    assert look(trainer(pl, max_epochs=3), module, Batches(batches(2)), steps=5, pairs=0).steps == 5


class Uncopyable(nn.Module):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("it holds a file")


def test_wrong_arguments(pl: Any) -> None:
    module = module_of(pl)
    with pytest.raises(npl.ArgumentError, match="steps must be an integer of 1 or more; got 0"):
        look(trainer(pl), module, Batches(batches(2)), steps=0)
    with pytest.raises(npl.ArgumentError, match="the training must have at least one step with a loss; got none"):
        look(trainer(pl), module, Batches([]), steps=2)
    module.model.append(Uncopyable())
    with pytest.raises(npl.ArgumentTypeError, match=r"can be copied.*raised RuntimeError: it holds a file"):
        look(trainer(pl), module, Batches(batches(2)), steps=2)


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of a configuration of fit, with its own callback and its own data."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "look.png"
    config = ["--config", "examples/classify_digits.yaml", f"--trainer.default_root_dir={tmp_path}"]
    assert main(["look", *config, "--steps", "4", "--pairs", "1", "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("4 plain steps")
    assert "Outputs 'net.2' of shape (64, 10), 64 samples (dim 0) x 10 features" in printed
    assert "Recommended: " in printed
    assert f"Picture: {picture}" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["look.png"], "nothing else is written"
    assert main(["look", *config, "--steps", "0"]) == 2
    assert "error: steps must be an integer of 1 or more; got 0." in capsys.readouterr().err
