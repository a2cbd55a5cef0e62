"""Learn to rank images of handwritten digits from nothing but their order.

A network scores each of n images; NeuralSort (or another method) turns the scores into a soft permutation matrix
P, and the loss compares P with the true one. No image is ever labelled with its digit.

    python -m newton_plugin_lightning fit --config examples/rank_digits.yaml
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from examples.digit_lists import DigitLists
from newton_plugin.algorithms import RankingLoss, neural_sort
from newton_plugin_lightning import RankAccuracy

try:
    import pytorch_lightning as pl
except ModuleNotFoundError:
    import lightning.pytorch as pl


class DigitRankingData(pl.LightningDataModule):
    """1000 images in fresh lists at every step; 2000 fixed lists each of 300 and 497 others."""

    def __init__(self, n: int = 10, batch_size: int = 32, steps: int = 1500, seed: int = 0) -> None:
        super().__init__()
        self.train = DigitLists("train", n, batch_size, steps, seed)
        self.validation = DigitLists("validation", n, batch_size=500, batches=4, seed=1, fixed=True)
        self.test = DigitLists("test", n, batch_size=500, batches=4, seed=2, fixed=True)

    def train_dataloader(self) -> DigitLists:
        return self.train

    def val_dataloader(self) -> DigitLists:
        return self.validation

    def test_dataloader(self) -> DigitLists:
        return self.test


class RankDigits(pl.LightningModule):
    """An MLP 64-64-32-1 that scores images, Adam with cosine decay over ``steps``.

    Args:
        loss: a method by name has this package's stable loss; "textbook" is what one would write down first,
            ``BCELoss`` on NeuralSort's matrix. In exact arithmetic "neural_sort" is the same number.
        temperature: lower is sharper; the steepness of "sorting_network" is 1 / temperature.
        learning_rate, steps: of Adam at the first step, and the length of its cosine decay.
    """

    def __init__(
        self,
        loss: Literal["neural_sort", "soft_sort", "sorting_network", "textbook"] = "neural_sort",
        temperature: float = 0.1,
        learning_rate: float = 1e-2,
        steps: int = 1500,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
        method = "neural_sort" if loss == "textbook" else loss
        sharpness = {"steepness": 1 / temperature} if loss == "sorting_network" else {"temperature": temperature}
        self.stable_loss = RankingLoss(method, reduction="mean", **sharpness)
        self.full = RankAccuracy("full")
        self.elements = RankAccuracy("elements")

    def forward(self, images: Tensor) -> Tensor:
        """(N, n, 64) -> scores (N, n)."""
        return self.network(images).squeeze(-1)

    def ranking_loss(self, scores: Tensor, ranks: Tensor) -> Tensor:
        if self.hparams["loss"] != "textbook":
            return self.stable_loss(scores, ranks)
        soft = neural_sort(scores, self.hparams["temperature"])  # rows are ranks
        return nn.BCELoss()(soft, nn.functional.one_hot(ranks, ranks.shape[-1]).mT.to(soft.dtype))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = self.ranking_loss(self(batch[0]), batch[1])
        self.log("loss", loss, batch_size=len(batch[1]))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        scores, ranks = self(batch[0]), batch[1]
        for name, metric in (("full", self.full), ("elements", self.elements)):
            metric.update(scores, ranks)
            self.log(f"{stage}/{name}", metric, batch_size=len(ranks), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams["learning_rate"])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams["steps"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
