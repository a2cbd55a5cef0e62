"""Run by the interpreter of an environment that has the wheel and nothing of this checkout (``make package``).

    python -I tests/packaging/installed.py [lightning] [transformers]

``-I`` keeps the current folder off ``sys.path``. The arguments name the extras that are installed beside torch. What
needs another extra must be refused with a sentence that says what to install.
"""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import newton_plugin as npl

PACKAGES = {"lightning": "newton_plugin_lightning", "transformers": "newton_plugin_transformers"}


def check_place(module: Any) -> None:
    """From the environment, not from a checkout."""
    assert Path(module.__file__).is_relative_to(sys.prefix), module.__file__


def check_core() -> None:
    check_place(npl)
    assert npl.__version__ == metadata.version("newton-plugin")
    model, hook = torch.nn.Linear(3, 2), npl.LossHook()
    hook(torch.nn.functional.cross_entropy(model(torch.randn(8, 3)), torch.randint(0, 2, (8,)))).backward()
    assert hook.diagnostics()["step_norm"] > 0
    for room in ("algorithms", "convex", "bilevel", "testing"):
        importlib.import_module(f"newton_plugin.{room}")


def check_missing(extra: str) -> None:
    try:
        importlib.import_module(PACKAGES[extra])
    except npl.NewtonPluginError as error:
        message = str(error)
    else:
        message = "imported"
    assert f"pip install 'newton-plugin[{extra}]'" in message, message


def check_lightning() -> None:
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    import newton_plugin_lightning

    check_place(newton_plugin_lightning)

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(3, 2)

        def training_step(self, batch: Any) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    newton = newton_plugin_lightning.NewtonLosses()
    data = DataLoader(TensorDataset(torch.randn(32, 3), torch.randint(0, 2, (32,))), 8)
    pl.Trainer(callbacks=[newton], fast_dev_run=4, accelerator="cpu", enable_model_summary=False).fit(Model(), data)
    assert newton.hook.diagnostics()["step_norm"] > 0


def check_transformers() -> None:
    import newton_plugin_transformers

    check_place(newton_plugin_transformers)
    logits = torch.randn(8, 3, requires_grad=True)
    newton_plugin_transformers.NewtonTrainerLoss()({"logits": logits}, torch.arange(8) % 3, 16).backward()
    assert logits.grad is not None


if __name__ == "__main__":
    check_core()
    for extra in PACKAGES:
        if extra not in sys.argv[1:]:
            check_missing(extra)
        elif extra == "lightning":
            check_lightning()
        else:
            check_transformers()
    print("fine:", "torch alone" if len(sys.argv) == 1 else ", ".join(sys.argv[1:]))
