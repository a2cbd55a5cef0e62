"""A module small enough to be trained many times, for both Lightnings, and what makes it."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
from tests.lightning.fits import Batches
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

TREES = ["pytorch_lightning", "lightning.pytorch"]
STEPS = 12


def loader() -> Any:
    """64 samples of 4 features in batches of 16, shuffled; the targets are noisy."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(-1, keepdim=True) + torch.randn(64, 1, generator=generator)), 16, True)


def module(tree: str, lr: float = 0.01, fail: bool = False, nan_below: float = 0.0, manual: bool = False) -> Any:
    """A linear layer with SGD. ``fail``: its step raises. ``nan_below``: the metric is NaN where the norm is below."""
    pl = importlib.import_module(tree)

    class Small(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 1)
            self.automatic_optimization = not manual

        def training_step(self, batch: Any) -> Tensor | None:
            if fail:
                raise ZeroDivisionError("theirs")
            loss = (self.net(batch[0]) - batch[1]).square().mean()
            if manual:
                optimizer: Any = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
                return None
            return loss

        def validation_step(self, batch: Any) -> None:
            loss = (self.net(batch[0]) - batch[1]).square().mean()
            bad = float(self.net.weight.detach().norm()) < nan_below
            self.log("val/loss", loss * float("nan") if bad else loss)
            self.log("val/other", loss)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=lr)

    return Small()


def loaders() -> tuple[Any, Any]:
    """For training and validation."""
    return loader(), Batches([next(iter(loader()))])


# Functions that another process can import.
make = functools.partial(module, "pytorch_lightning")


class Dies:
    """Makes a module, but the first calls, counted in a file over all processes, end their process."""

    def __init__(self, path: str, times: int) -> None:
        self.path, self.times = path, times

    def __call__(self) -> Any:
        with open(self.path, "a+") as file:
            file.write("here\n")
            file.seek(0)
            calls = len(file.readlines())
        if calls <= self.times:
            os._exit(9)
        return make()
