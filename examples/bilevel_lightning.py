"""Clean a data set while training on it, in Lightning: a fifth of the labels is wrong, 300 clean images judge.

Manual optimization, one optimizer for both levels, and a loader that gives a training and a clean batch at once.

    python -m examples.bilevel_lightning
"""

import argparse
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional import auroc

from examples.digit_lists import digit_images
from newton_plugin.bilevel import MASOBA

try:
    import pytorch_lightning as pl
    from pytorch_lightning.utilities import CombinedLoader
except ModuleNotFoundError:
    import lightning.pytorch as pl
    from lightning.pytorch.utilities import CombinedLoader


def noisy_digits(seed: int = 0) -> tuple[TensorDataset, TensorDataset, Tensor]:
    """(index, image, label) with a fifth of the labels wrong; (image, label), clean; which labels are wrong."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = digit_images("train")
    wrong = torch.rand(len(labels), generator=generator) < 0.2
    shift = torch.randint(1, 10, labels.shape, generator=generator)
    given = torch.where(wrong, (labels + shift) % 10, labels)
    return TensorDataset(torch.arange(len(labels)), images, given), TensorDataset(*digit_images("validation")), wrong


class CleanDigits(pl.LightningModule):
    """Softmax regression (lower level) under the weights of the images (upper level)."""

    def __init__(self, lr_upper: float = 100.0, lr_lower: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False  # the optimizer differentiates both losses itself
        self.model = nn.Linear(64, 10)
        self.logits = nn.Parameter(torch.zeros(1000))

    def training_step(self, batch: dict[str, Any]) -> None:
        index, images, labels = batch["train"]
        clean_images, clean_labels = batch["clean"]

        def upper() -> Tensor:
            return cross_entropy(self.model(clean_images), clean_labels)

        def lower() -> Tensor:
            losses = cross_entropy(self.model(images), labels, reduction="none")
            decay = sum(p.square().sum() for p in self.model.parameters())
            return (self.logits[index].sigmoid() * losses).mean() + 1e-3 * decay

        optimizer = self.optimizers()
        if self.global_step == 0:
            optimizer.optimizer.warm_start(lower, 100)
        self.log("clean_loss", optimizer.step(closure=upper, lower_closure=lower), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        rates = {"lr_upper": self.hparams["lr_upper"], "lr_lower": self.hparams["lr_lower"]}
        return MASOBA([self.logits], self.model.parameters(), **rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=80)
    options = parser.parse_args()
    pl.seed_everything(0)
    train, clean, wrong = noisy_digits()
    loaders = {"train": DataLoader(train, 100, shuffle=True), "clean": DataLoader(clean, 100, shuffle=True)}
    module = CleanDigits()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=options.epochs, accelerator="cpu", enable_progress_bar=False, **quiet)
    trainer.fit(module, CombinedLoader(loaders, "max_size_cycle"))

    images, labels = digit_images("test")
    with torch.no_grad():
        accuracy = (module.model(images).argmax(-1) == labels).double().mean()
    found = auroc(-module.logits.detach(), wrong.long(), task="binary")
    print(f"wrong labels found: AUROC {float(found):.3f}; test accuracy {100 * float(accuracy):.1f} %")


if __name__ == "__main__":
    main()
