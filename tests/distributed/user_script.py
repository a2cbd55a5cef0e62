"""What a user runs: one script, ``strategy="ddp"``, two CPU processes. Lightning starts the second one itself.

python user_script.py OUT SCENARIO
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from tests.cases import curved
from tests.distributed.scenarios import BATCHES, network, part
from torch import Tensor

from newton_plugin_lightning import NewtonLosses

OPTIONS: dict[str, dict[str, Any]] = {
    "plain_ddp": {},
    "accumulate": {"accumulate_grad_batches": 2},
    "clipping": {"gradient_clip_val": 0.05},
    "static_graph": {"strategy": "static"},
    "killed": {},
    "nan": {},
}


class Model(pl.LightningModule):
    def __init__(self, scenario: str) -> None:
        super().__init__()
        self.network = network()
        self.scenario = scenario

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, t = batch
        if self.scenario == "killed" and batch_idx == 2 and self.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.scenario == "nan" and batch_idx == 1 and self.global_rank == 1:
            x = x * torch.nan
        return curved(self.network(x), t)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.scenario == "nan":  # as a gradient scaler would skip the step
            bad = any(not bool(p.grad.isfinite().all()) for p in self.parameters() if p.grad is not None)
            if bad:
                self.zero_grad()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Loader:
    """Each rank's half of every batch. Made before the rank is known, so it asks when it is read."""

    def __len__(self) -> int:
        return len(BATCHES)

    def __iter__(self) -> Any:
        rank = int(os.environ.get("LOCAL_RANK", 0))
        return iter([part(rank, whole) for whole in BATCHES])


def fit(out: Path, scenario: str, devices: int = 2) -> None:
    from pytorch_lightning.strategies import DDPStrategy

    options = dict(OPTIONS[scenario])
    if options.get("strategy") == "static":
        options["strategy"] = DDPStrategy(static_graph=True, process_group_backend="gloo")
    newton = NewtonLosses(damping="auto")
    model = Model(scenario)
    trainer = pl.Trainer(
        **{"strategy": "ddp", **options},
        accelerator="cpu",
        devices=devices,
        callbacks=[newton],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(model, Loader())
    state = {"parameters": model.state_dict(), "newton": newton.state_dict()}
    torch.save(state, out / f"rank{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    fit(Path(sys.argv[1]), sys.argv[2])
