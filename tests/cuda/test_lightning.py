"""Fits on the device: every precision of the Trainer, and in float64 the numbers of a plain loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.cuda.device import CPU, DEVICE, cuda_alone, error
from tests.cuda.training import TASKS, Batch, network, train
from torch import Tensor, nn

import newton_plugin as npl

pl = pytest.importorskip("pytorch_lightning")
pytest.importorskip("torchmetrics")

from newton_plugin_lightning import NewtonLosses  # noqa: E402

TASK = TASKS["cross_entropy"]


class Module(pl.LightningModule):
    """A plain module that knows nothing of the plugin."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = network(TASK.outputs, CPU, dtype)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert batch[0].device.type == DEVICE.type
        loss = TASK.loss(self.model(batch[0]), batch[1])
        self.log("loss", loss, batch_size=1)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Batches:
    """A loader: Lightning takes any iterable that is not a list."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


def fit(precision: str, dtype: torch.dtype, callback: Any, **options: Any) -> nn.Module:
    module = Module(dtype)
    if precision == "16-mixed" and DEVICE.type == "cpu":  # the Trainer's own choice would silently be bf16
        scaler = torch.amp.GradScaler("cpu")
        options["plugins"] = pl.plugins.MixedPrecision(precision, "cpu", scaler=scaler)
    else:
        options["precision"] = precision
    pl.Trainer(
        accelerator="gpu" if DEVICE.type == "cuda" else "cpu",
        devices=1,
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    ).fit(module, Batches(TASK.batches(3, dtype)))
    return module.model


def vector(net: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach().cpu()


@pytest.mark.parametrize("options", [{}, {"structure": "mean"}, {"curvature": "hessian"}], ids=str)
@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed", "16-mixed"])
def test_a_fit(precision: str, options: dict[str, Any]) -> None:
    dtype = torch.float64 if precision == "64-true" else torch.float32
    before = vector(network(TASK.outputs, CPU, dtype))
    callback = NewtonLosses(**options)
    after = vector(fit(precision, dtype, callback))
    assert bool(torch.isfinite(after).all())
    assert not torch.equal(after, before)
    found = callback.hook.diagnostics()
    assert found["step_norm"] > 0
    assert found["fallbacks"] == 0


@pytest.mark.parametrize("options", [{}, {"structure": "mean", "damping": 0.1}, {"curvature": "hessian"}], ids=str)
def test_a_fit_is_the_plain_loop(options: dict[str, Any]) -> None:
    ours = vector(fit("64-true", torch.float64, NewtonLosses(**options)))
    for device in (DEVICE, CPU):
        hook, net = npl.LossHook(**options), network(TASK.outputs, device)
        train(net, lambda y, t, hook=hook: hook(TASK.loss(y, t)), TASK.batches())
        assert error(ours, vector(net)) <= 1e-9


@cuda_alone
def test_no_numbers_are_read_where_nobody_logs_them() -> None:
    """Reading diagnostics waits for the device: without a logger the callback never does."""

    class Unread(NewtonLosses):
        def _log(self, module: Any) -> None:
            torch.cuda.set_sync_debug_mode("error")
            try:
                super()._log(module)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    fit("32-true", torch.float32, Unread())
