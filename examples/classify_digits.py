"""Plain classification of handwritten digits: the control. An easy loss gains nothing from a Newton step.

python -m newton_plugin_lightning fit --config examples/classify_digits.yaml
"""

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.digit_lists import Part, digit_images

try:
    import pytorch_lightning as pl
except ModuleNotFoundError:
    import lightning.pytorch as pl


class DigitData(pl.LightningDataModule):
    """1000 images of digits to train on, 300 others to validate."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def loader(self, part: Part, shuffle: bool) -> DataLoader:
        return DataLoader(TensorDataset(*digit_images(part)), self.batch_size, shuffle=shuffle)

    def train_dataloader(self) -> DataLoader:
        return self.loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return self.loader("validation", shuffle=False)


class ClassifyDigits(pl.LightningModule):
    """An MLP 64-64-10 with cross-entropy. It knows nothing of the plugin."""

    def __init__(self, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 64) -> logits (N, 10)."""
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        right = (self(batch[0]).argmax(-1) == batch[1]).float().mean()
        self.log("val/accuracy", right, prog_bar=True, batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)
