"""Maps to learn from: generated ones, or those of the Warcraft benchmark."""

import torch
from torch.utils.data import DataLoader, TensorDataset

from examples.terrain import Maps, draw_maps
from examples.terrain_files import load_warcraft

try:
    import pytorch_lightning as pl
except ModuleNotFoundError:
    import lightning.pytorch as pl


class TerrainData(pl.LightningDataModule):
    """1000 generated maps to train on, 250 and 500 others to validate and test.

    Args:
        size, batch_size: of the maps, in tiles; of the batches to train on.
        seed: of the order of the maps to train on.
        warcraft: a folder with the real maps of one size, in place of generated ones.
    """

    def __init__(self, size: int = 12, batch_size: int = 32, seed: int = 0, warcraft: str | None = None) -> None:
        super().__init__()
        self.size, self.batch_size, self.warcraft = size, batch_size, warcraft
        self.generator = torch.Generator().manual_seed(seed)
        self.maps: dict[str, Maps] = {}

    def setup(self, stage: str) -> None:
        for part in ("test",) if stage == "test" else ("train", "val"):
            if self.warcraft is not None:
                self.maps[part] = load_warcraft(self.warcraft, part)
            elif part not in self.maps:
                count, seed = {"train": (1000, 0), "val": (250, 1), "test": (500, 2)}[part]
                self.maps[part] = draw_maps(count, self.size, seed)

    def train_dataloader(self) -> DataLoader:
        data = TensorDataset(*self.maps["train"])
        return DataLoader(data, self.batch_size, shuffle=True, drop_last=True, generator=self.generator)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.maps["val"]), 250)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(TensorDataset(*self.maps["test"]), 250)
