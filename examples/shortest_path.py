"""Learn what terrains cost from nothing but shortest paths.

A network looks at the picture of a map and gives each tile a cost; a differentiable shortest path over these costs is
compared with the true path. No tile is ever labelled with its cost.

    python -m newton_plugin_lightning fit --config examples/shortest_path.yaml
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from newton_plugin.algorithms import FenchelYoungLoss, StochasticSmoothing, relaxed_bellman_ford, shortest_path
from newton_plugin_lightning import CostRatio, PathAccuracy

try:
    import pytorch_lightning as pl
except ModuleNotFoundError:
    import lightning.pytorch as pl


def solve(costs: Tensor) -> Tensor:
    """Exact paths; noise may have made a cost negative."""
    return shortest_path(costs.clamp(min=0)).path


class TerrainCosts(pl.LightningModule):
    """Costs of tiles by convolutions that see one tile each; Adam with cosine decay over ``steps``.

    Args:
        loss: a relaxed Bellman-Ford, read back by a "for" or "while" loop, with L1 or squared L2 against the true path;
            "smoothing": the exact path smoothed by noise, L1; or "fenchel_young".
        steepness: of the relaxation. samples, sigma: of the noise.
        learning_rate, steps: of Adam at the first step, and the length of its cosine decay.
    """

    def __init__(
        self,
        loss: Literal["for_l1", "for_l2", "while_l1", "while_l2", "smoothing", "fenchel_young"] = "for_l2",
        steepness: float = 5.0,
        samples: int = 10,
        sigma: float = 0.5,
        learning_rate: float = 1e-2,
        steps: int = 300,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        tile = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.ReLU(), nn.Conv2d(16, 32, 2, 2), nn.ReLU(), nn.Conv2d(32, 1, 1))
        self.network = nn.Sequential(tile, nn.Flatten(1, 2), nn.Softplus())
        noise = {"samples": samples, "sigma": sigma}
        self.smooth = StochasticSmoothing(solve, estimator="finite_difference", **noise)
        self.fenchel_young = FenchelYoungLoss(solve, minimize=True, **noise)
        self.perfect, self.ratio = PathAccuracy(), CostRatio()

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, 8h, 8w), bytes -> costs (N, h, w)."""
        return self.network((images - 110.0) / 40.0)

    def path_loss(self, costs: Tensor, paths: Tensor) -> Tensor:
        name = self.hparams["loss"]
        if name == "fenchel_young":
            return self.fenchel_young(costs, paths)
        if name == "smoothing":
            return nn.functional.l1_loss(self.smooth(costs), paths)
        loop, norm = name.split("_")
        soft = relaxed_bellman_ford(costs, loop=loop, steepness=self.hparams["steepness"])
        return (nn.functional.l1_loss if norm == "l1" else nn.functional.mse_loss)(soft, paths)

    def training_step(self, batch: Any) -> Tensor:
        images, _, paths = batch
        loss = self.path_loss(self(images), paths)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Any) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: Any) -> None:
        images, costs, paths = batch
        found = shortest_path(self(images)).path
        self.perfect.update(found, paths)
        self.ratio.update(found, paths, costs)
        self.log_dict({f"{stage}/perfect": self.perfect, f"{stage}/cost_ratio": self.ratio}, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams["learning_rate"])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.hparams["steps"])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
