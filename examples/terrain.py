"""Maps of five terrains with their shortest paths, as the Warcraft benchmark has them: drawn from a seed.

Each terrain has a smooth random height and the highest one wins a tile, so terrains form connected regions. Kept are
maps with exactly one shortest path, and only those where a shortcut fails: neither equal costs everywhere (the
diagonal) nor two costs, cheap or dear, give the path. About one map in twenty survives.

    python -m examples.terrain          # what shortcuts score, before and after
"""

from typing import NamedTuple

import torch
from torch import Tensor

from newton_plugin.algorithms import shortest_path

COSTS = (0.8, 1.2, 5.3, 7.7, 9.2)  # per tile
COLOURS = ((120, 140, 80), (160, 135, 95), (50, 95, 60), (115, 115, 120), (45, 75, 135))
TILE = 8  # pixels


class Maps(NamedTuple):
    """images (N, 3, 8h, 8w) uint8, costs (N, h, w), paths (N, h, w) of zeros and ones."""

    images: Tensor
    costs: Tensor
    paths: Tensor


def draw_terrains(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Any maps, solvable by shortcuts or not: (N, size, size) integers 0 to 4."""
    heights = torch.randn(count, 5, size * 2 // 3, size * 2 // 3, generator=generator)
    options = {"size": (size, size), "mode": "bicubic", "align_corners": True}
    return torch.nn.functional.interpolate(heights, **options).argmax(1)


def is_only_path(costs: Tensor, paths: Tensor) -> Tensor:
    """Whether the shortest path is unique: a little more on its tiles, and another one of its cost would win."""
    return same_path(shortest_path(costs.double() + 1e-4 * paths).path, paths)


def same_path(a: Tensor, b: Tensor) -> Tensor:
    """(..., h, w) twice -> (...), equal on every tile."""
    return (a == b).flatten(-2).all(-1)


def shortcuts(costs: Tensor) -> dict[str, Tensor]:
    """Paths by what a model might know that has not learned the terrains' costs."""
    dear = costs > 3
    return {
        "constant costs": shortest_path(torch.ones_like(costs)).path,
        "two costs, 1 and 7.4": shortest_path(torch.where(dear, 7.4, 1.0)).path,
        "two costs, 1 and 100": shortest_path(torch.where(dear, 100.0, 1.0)).path,
    }


def draw_maps(count: int, size: int = 12, seed: int = 0) -> Maps:
    """``count`` hard maps of size x size tiles."""
    generator = torch.Generator().manual_seed(seed)
    kept: list[Tensor] = []
    while sum(map(len, kept)) < count:
        terrains = draw_terrains(2000, size, generator)
        costs = torch.tensor(COSTS)[terrains]
        paths = shortest_path(costs.double()).path
        hard = is_only_path(costs, paths)
        for path in shortcuts(costs).values():
            hard &= ~same_path(path, paths)
        kept.append(terrains[hard])
    terrains = torch.cat(kept)[:count]
    costs = torch.tensor(COSTS)[terrains]
    return Maps(draw_images(terrains, generator), costs, shortest_path(costs.double()).path.float())


def draw_images(terrains: Tensor, generator: torch.Generator) -> Tensor:
    """One of four textures of its terrain for each tile, brighter or darker, with noise on every pixel."""
    n, h, w = terrains.shape
    fixed = torch.Generator().manual_seed(2020)  # the tile set, the same in all data
    texture = torch.randn(5, 4, TILE, TILE, generator=fixed) * torch.tensor([10, 16, 22, 14, 8]).view(5, 1, 1, 1)
    tiles = torch.tensor(COLOURS).view(5, 1, 3, 1, 1) + texture.unsqueeze(2)
    tiles = tiles[terrains, torch.randint(4, (n, h, w), generator=generator)]  # (n, h, w, 3, 8, 8)
    tiles = tiles + 12 * torch.randn(n, h, w, 1, 1, 1, generator=generator)
    images = tiles.permute(0, 3, 1, 4, 2, 5).reshape(n, 3, h * TILE, w * TILE)
    return (images + 6 * torch.randn(images.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


if __name__ == "__main__":
    terrains = draw_terrains(20000, 12, torch.Generator().manual_seed(0))
    every = torch.tensor(COSTS)[terrains]
    true = shortest_path(every.double()).path
    unique = is_only_path(every, true)
    hard = draw_maps(1000)
    print(f"{100 * unique.float().mean():.1f} % of all maps have one shortest path. Solved by shortcuts, %:")
    for name, path in shortcuts(every).items():
        solved = same_path(path, true)[unique].float().mean()
        left = same_path(shortcuts(hard.costs)[name], hard.paths).float().mean()
        print(f"{name:22s} {100 * solved:5.1f} of those, {100 * left:5.1f} of the maps kept")
