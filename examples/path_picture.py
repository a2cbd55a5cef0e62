"""A picture at the end of a training: maps, the costs that were learned, and the paths."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from newton_plugin.algorithms import shortest_path

try:
    import pytorch_lightning as pl
except ModuleNotFoundError:
    import lightning.pytorch as pl


class PathPicture(pl.Callback):
    """Draws the first ``count`` validation maps into ``file`` when the training ends."""

    def __init__(self, file: str = "paths.png", count: int = 4) -> None:
        self.file, self.count = Path(file), count

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        images, costs, paths = (t[: self.count] for t in next(iter(trainer.datamodule.val_dataloader())))
        with torch.no_grad():
            learned = pl_module(images.to(pl_module.device)).cpu()
        draw(images, costs, paths, learned, self.file)


def draw(images: Tensor, costs: Tensor, paths: Tensor, learned: Tensor, file: Path) -> None:
    """Rows: the map with the true path, its true costs, the learned costs with the path they give."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = shortest_path(learned).path
    h, w = costs.shape[1:]
    names = ["map, true path", "true costs", "learned costs,\npredicted path"]
    figure, axes = plt.subplots(3, len(costs), figsize=(2.6 * len(costs), 7.6), squeeze=False, layout="constrained")
    for k in range(len(costs)):
        top, middle, bottom = axes[:, k]
        top.imshow(images[k].permute(1, 2, 0).numpy(), extent=(-0.5, w - 0.5, h - 0.5, -0.5))
        mark(top, paths[k], "white", "o")
        middle.imshow(costs[k].numpy(), cmap="cividis")
        bottom.imshow(learned[k].numpy(), cmap="cividis")
        mark(bottom, found[k], "white", "o")
        mark(bottom, (found[k] != paths[k]).float(), "red", "x")
        ratio = float((found[k] * costs[k]).sum() / (paths[k] * costs[k]).sum())
        right = bool((found[k] == paths[k]).all())
        bottom.set_xlabel("right" if right else f"wrong: {100 * (ratio - 1):.1f} % dearer")
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=80)
    plt.close(figure)


def mark(axis: Any, tiles: Tensor, colour: str, sign: str) -> None:
    rows, columns = tiles.nonzero(as_tuple=True)
    axis.scatter(
        columns, rows, c=colour, marker=sign, s=24, edgecolors="black" if sign == "o" else None, linewidths=0.8
    )
