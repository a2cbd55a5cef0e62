"""The Lightning recipe of docs/bilevel.md, and what mixed precision may not do."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from newton_plugin.bilevel import MASOBA, AccBO, GradScalerError


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def pl(request: pytest.FixtureRequest) -> Any:
    return importlib.import_module(request.param)


class Batches:
    """(indices, features, labels), the same in every pass."""

    def __init__(self, batches: list[tuple[Tensor, ...]]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Any:
        return iter(self.batches)


def _batches() -> tuple[Batches, Batches]:
    generator = torch.Generator().manual_seed(0)
    z, labels = torch.randn(48, 4, generator=generator), torch.randint(0, 2, (48,), generator=generator)
    train = [(i, z[i], labels[i]) for i in torch.arange(32).split(8)]
    return Batches(train), Batches([(z[32 + i], labels[32 + i]) for i in torch.arange(16).split(4)])


def _net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))


def _losses(net: nn.Module, weights: Tensor, batch: Any) -> tuple[Any, Any]:
    (index, z, labels), (z_val, labels_val) = batch["train"], batch["validation"]

    def upper() -> Tensor:
        return nn.functional.cross_entropy(net(z_val), labels_val)

    def lower() -> Tensor:
        losses = nn.functional.cross_entropy(net(z), labels, reduction="none")
        return (weights[index].sigmoid() * losses).mean() + 0.01 * sum(p.square().sum() for p in net.parameters())

    return upper, lower


def _module(pl: Any, method: Any) -> Any:
    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.net = _net()
            self.weights = nn.Parameter(torch.zeros(32))

        def training_step(self, batch: Any) -> None:
            upper, lower = _losses(self.net, self.weights, batch)
            self.log("upper", self.optimizers().step(closure=upper, lower_closure=lower))

        def configure_optimizers(self) -> Any:
            return method([self.weights], self.net.parameters(), lr_upper=0.1, lr_lower=0.05)

        def train_dataloader(self) -> Any:
            train, validation = _batches()
            combined = importlib.import_module(f"{pl.__name__}.utilities").CombinedLoader
            return combined({"train": train, "validation": validation}, "max_size_cycle")

    return Module()


def _trainer(pl: Any, tmp_path: Any, **options: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet, **options)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory")
@pytest.mark.parametrize("method", [MASOBA, AccBO])
def test_a_fit_is_the_plain_loop_and_resumes(pl: Any, method: Any, tmp_path: Any) -> None:
    module = _module(pl, method)
    trainer = _trainer(pl, tmp_path, max_epochs=2)
    trainer.fit(module)
    assert int(module.net[1].num_batches_tracked) == 16  # both losses go through it

    net, weights = _net(), torch.zeros(32, requires_grad=True)
    optimizer = method([weights], net.parameters(), lr_upper=0.1, lr_lower=0.05)
    for _ in range(2):
        for train, validation in zip(*_batches(), strict=True):
            optimizer.step(*_losses(net, weights, {"train": train, "validation": validation}))
    assert torch.equal(module.weights, weights)
    for p, q in zip(module.net.parameters(), net.parameters(), strict=True):
        assert torch.equal(p, q)

    half = _module(pl, method)
    first = _trainer(pl, tmp_path, max_epochs=1)
    first.fit(half)
    first.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)  # plain types and tensors
    resumed = _module(pl, method)
    _trainer(pl, tmp_path, max_epochs=2).fit(resumed, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.weights, weights)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory")
def test_half_precision_with_a_scaler_is_refused_and_bfloat16_is_not(pl: Any, tmp_path: Any) -> None:
    plugins = importlib.import_module(f"{pl.__name__}.plugins")
    scaled = plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(GradScalerError, match="MASOBA cannot be stepped through a GradScaler"):
        _trainer(pl, tmp_path, max_epochs=1, plugins=[scaled], enable_checkpointing=False).fit(_module(pl, MASOBA))
    module = _module(pl, MASOBA)
    _trainer(pl, tmp_path, max_epochs=1, precision="bf16-mixed", enable_checkpointing=False).fit(module)
    assert float(module.weights.detach().norm()) > 0
