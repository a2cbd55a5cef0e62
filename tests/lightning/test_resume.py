"""Checkpoints written in the middle of an epoch, read with, without and after the plugin."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cases import Functional
from tests.lightning.fits import Batches, batches_of, case_module, parameters, trainer
from tests.lightning.test_state import _weights_only, equal

from newton_plugin_lightning import NewtonLosses

STEPS, STOP = 12, 7  # of 2 epochs of 6 batches; stopped within the second


class Resumable(Batches):
    """A loader that can be asked where it is, as torchdata's; an ordinary one starts its epoch again."""

    def __init__(self) -> None:
        super().__init__(batches_of(Functional, 6))
        self.next = 0

    def __iter__(self) -> Iterator[Any]:
        for k in range(self.next, len(self.batches)):
            self.next = k + 1
            yield self.batches[k]
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def adam(self: Any) -> Any:
    optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 3), "interval": "step"},
    }


def run(
    pl: Any, folder: Path, newton: Any, steps: int = STEPS, resume: Path | None = None, loader: Any = None
) -> tuple[Any, dict[int, Path]]:
    """A fit of ``steps`` steps with a checkpoint after each; the module and the checkpoints."""
    saver = pl.callbacks.ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module = case_module(pl, Functional, configure_optimizers=adam)
    fit = trainer(pl, *([newton] if newton else []), saver, max_epochs=-1, max_steps=steps, enable_checkpointing=True)
    options = {"ckpt_path": str(resume), **_weights_only(pl)} if resume else {}
    fit.fit(module, loader or Resumable(), **options)
    return module, {int(p.stem.partition("=")[2].partition("-")[0]): p for p in folder.iterdir()}


@pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning")
@pytest.mark.filterwarnings("ignore:The dataloader, train_dataloader:UserWarning")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch:UserWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
class TestMiddleOfAnEpoch:
    @pytest.mark.parametrize("curvature", ["fisher", "hessian"])
    def test_resumed_and_uninterrupted_checkpoints_are_equal_to_the_bit(
        self, pl: Any, tmp_path: Path, curvature: Any
    ) -> None:
        _, whole = run(pl, tmp_path / "whole", NewtonLosses(curvature=curvature))
        _, first = run(pl, tmp_path / "first", NewtonLosses(curvature=curvature), STOP)
        _, second = run(pl, tmp_path / "second", NewtonLosses(curvature=curvature), resume=first[STOP])
        assert sorted(second) == list(range(STOP + 1, STEPS + 1))
        for step in sorted(second):
            ours, theirs = (torch.load(p[step], weights_only=True) for p in (second, whole))
            parts = [c["optimizer_states"] + c["lr_schedulers"] for c in (ours, theirs)]
            assert equal(ours["state_dict"], theirs["state_dict"]), step
            assert all(map(equal, *parts)), step
            assert equal(ours["callbacks"]["NewtonLosses"], theirs["callbacks"]["NewtonLosses"]), step

    def test_a_checkpoint_from_without_the_callback_goes_on_with_it(self, pl: Any, tmp_path: Path) -> None:
        """The running curvature starts there; parameters and optimizer come from the file."""
        _, plain = run(pl, tmp_path / "plain", None, STOP)
        newton = NewtonLosses()
        module, after = run(pl, tmp_path / "after", newton, resume=plain[STOP])
        assert sorted(after) == list(range(STOP + 1, STEPS + 1))
        assert newton.hook.state_dict()["rules"]

        twin = NewtonLosses()
        again, _ = run(pl, tmp_path / "again", twin, resume=plain[STOP])
        assert all(map(torch.equal, parameters(module), parameters(again)))


def test_a_checkpoint_loads_where_the_plugin_is_not_installed(tmp_path: Path) -> None:
    """By torch, and by Lightning into a Trainer without it."""
    import pytorch_lightning as pl

    _, files = run(pl, tmp_path / "with", NewtonLosses(), 2, loader=Batches(batches_of(Functional, 6)))
    code = f"""
import sys, warnings
warnings.simplefilter("ignore")
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("newton_plugin", "newton_plugin_lightning"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch, pytorch_lightning as pl
path = {str(files[2])!r}
state = torch.load(path, weights_only=True)["state_dict"]
class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.ModuleDict(dict(trunk=torch.nn.Linear(4, 5), head=torch.nn.Linear(5, 3)))
    def training_step(self, batch, batch_idx):
        return self.model["head"](self.model["trunk"](batch.float())).square().mean()
    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters())
        return [optimizer], [dict(scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 3), interval="step")]
loader = torch.utils.data.DataLoader(torch.zeros(8, 4), batch_size=2)
trainer = pl.Trainer(max_epochs=-1, max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                     enable_model_summary=False, accelerator="cpu")
trainer.fit(Module(), loader, ckpt_path=path)
assert trainer.global_step == 3
assert not any(n.startswith("newton_plugin") for n in sys.modules)
print("loaded", len(state))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert "loaded 4" in done.stdout, done.stderr
