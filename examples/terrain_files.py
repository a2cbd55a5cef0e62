"""The Warcraft maps of Vlastelica et al. (ICLR 2020), if you have them."""

from pathlib import Path
from typing import Literal

import numpy as np
import torch

from examples.terrain import Maps

HELP = (
    "They are in warcraft_maps.tar.gz of the data set of Vlastelica, Paulus, Musil, Martius and Rolinek, "
    '"Differentiation of Blackbox Combinatorial Solvers" (ICLR 2020), https://doi.org/10.17617/3.YJCQ5S. '
    "Unpack it and pass the folder of one size, e.g. .../12x12."
)


def load_warcraft(folder: str | Path, part: Literal["train", "val", "test"], limit: int | None = None) -> Maps:
    """The first ``limit`` maps of one part (10,000 to train, 1,000 each to validate and test).

    Reads ``{part}_maps.npy`` (N, 8h, 8w, 3), ``{part}_vertex_weights.npy`` and ``{part}_shortest_paths.npy`` (N, h, w).
    """
    arrays = []
    for name in ("maps", "vertex_weights", "shortest_paths"):
        path = Path(folder) / f"{part}_{name}.npy"
        if not path.is_file():
            raise FileNotFoundError(f"folder must hold the Warcraft maps; there is no {path}. {HELP}")
        arrays.append(torch.from_numpy(np.array(np.load(path, mmap_mode="r")[:limit])))
    images, costs, paths = arrays
    n, h, w = costs.shape
    if images.shape != (n, 8 * h, 8 * w, 3) or paths.shape != (n, h, w):
        raise ValueError(
            f"{part} files of {folder} must be (N, 8h, 8w, 3), (N, h, w) and (N, h, w); got "
            f"{tuple(images.shape)}, {tuple(costs.shape)} and {tuple(paths.shape)}. {HELP}"
        )
    return Maps(images.permute(0, 3, 1, 2).contiguous().to(torch.uint8), costs.float(), paths.float())
