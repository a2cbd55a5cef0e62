"""Shortest paths: the costs of terrains, learned from the paths alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from benchmarks.evidence.data.images import Part
from benchmarks.evidence.data.noise import ReplicaNoise
from benchmarks.evidence.problems.problem import Batches, RowsLoss
from examples.terrain import draw_maps, same_path, shortcuts
from torch import Tensor, nn

from newton_plugin.algorithms import FenchelYoungLoss, StochasticSmoothing, relaxed_bellman_ford, shortest_path

__all__ = ["Paths", "path_problems", "shortcut_scores"]

SIGMA = 0.5


@dataclass(frozen=True)
class Paths:
    """Maps of size x size tiles; each tile is seen as the mean colours of its four quarters.

    Attributes:
        kind: "for_l1", "for_l2", "while_l1", "while_l2" (relaxed Bellman-Ford); "loss_score" (the Hamming loss,
            smoothed), "algorithm_score" and "algorithm_difference" (the path smoothed, squared L2), "fenchel_young".
        samples: of the noise, where there is some.
        wrong: share of the training paths that are replaced by another training map's, once for each run.
    """

    name: str
    title: str
    kind: str
    samples: int
    sharpnesses: tuple[float, ...]
    without: tuple[str, ...]
    size: int = 8
    table: str = "paths"
    steps: int = 300
    batch: int = 32
    optimizer: Literal["adam", "sgd"] = "adam"
    wrong: float = 0.0

    def network(self) -> nn.Module:
        last = [nn.Flatten(-2), nn.Unflatten(-1, (self.size, self.size)), nn.Softplus()]
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 1), *last)

    def batches(self, seeds: Sequence[int], batch: int, steps: int) -> Batches:
        tiles, paths = _maps("train", self.size)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shown = torch.stack([self._shown(len(tiles), seed) for seed in seeds])
        for _ in range(steps):
            index = torch.stack([torch.randint(len(tiles), (batch,), generator=g) for g in generators])
            yield tiles[index], paths[shown.gather(1, index)]

    def _shown(self, count: int, seed: int) -> Tensor:
        """(count,): whose path is shown with each map. The same maps are wrong at a lower share."""
        own = torch.arange(count)
        if not self.wrong:
            return own
        generator = torch.Generator().manual_seed(seed + 10**6)
        wrong = torch.rand(count, generator=generator) < self.wrong
        return torch.where(wrong, (own + torch.randint(1, count, (count,), generator=generator)) % count, own)

    def held_out(self, part: Part) -> tuple[Tensor, Tensor]:
        return _maps(part, self.size)

    def loss(self, sharpness: float | None, seeds: Sequence[int], textbook: bool) -> RowsLoss:
        smooth = {"samples": self.samples, "sigma": SIGMA, "noise": ReplicaNoise(seeds)}
        if self.kind == "fenchel_young":
            return FenchelYoungLoss(_solve, minimize=True, reduction="none", **smooth)
        if self.kind == "loss_score":
            return _SmoothedLoss(smooth)
        if self.kind.startswith("algorithm"):
            estimator = {"score": "score", "difference": "finite_difference"}[self.kind.removeprefix("algorithm_")]
            smoothed = StochasticSmoothing(_solve, estimator=estimator, **smooth)
            return lambda costs, paths: (smoothed(costs) - paths).square().mean((-2, -1))
        assert sharpness is not None
        loop, norm = self.kind.split("_")
        power = {"l1": 1, "l2": 2}[norm]

        def relaxed(costs: Tensor, paths: Tensor) -> Tensor:
            path = relaxed_bellman_ford(costs, loop=loop, steepness=sharpness)
            return (path - paths).abs().pow(power).mean((-2, -1))

        return relaxed

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        found = shortest_path(outputs.nan_to_num(0.0, 0.0, 0.0).clamp(min=0)).path
        return same_path(found, targets.expand(found.shape)).double()


def _solve(costs: Tensor) -> Tensor:
    """Exact paths; noise may have made a cost negative."""
    return shortest_path(costs.clamp(min=0)).path


class _SmoothedLoss:
    """The share of tiles that are wrongly on or off the path, smoothed as a whole."""

    def __init__(self, smooth: dict) -> None:
        self._paths = torch.zeros(0)
        self._smoothed = StochasticSmoothing(self._loss, **smooth)

    def _loss(self, costs: Tensor) -> Tensor:
        paths = self._paths.repeat(len(costs) // len(self._paths), 1, 1)
        return (_solve(costs) != paths).to(costs.dtype).mean((-2, -1))

    def __call__(self, costs: Tensor, paths: Tensor) -> Tensor:
        self._paths = paths
        return self._smoothed(costs)


@cache
def _maps(part: Part, size: int) -> tuple[Tensor, Tensor]:
    """Tiles (N, size^2, 12), standardised by fixed numbers, and paths (N, size, size)."""
    count, seed = {"train": (1000, 0), "validation": (250, 1), "test": (500, 2)}[part]
    maps = draw_maps(count, size, seed)
    pooled = nn.functional.avg_pool2d(maps.images.float(), 4)  # (N, 3, 2 size, 2 size)
    quarters = pooled.unfold(2, 2, 2).unfold(3, 2, 2)  # (N, 3, size, size, 2, 2)
    return ((quarters.permute(0, 2, 3, 1, 4, 5).reshape(count, size * size, 12) - 110) / 40), maps.paths


def shortcut_scores(size: int, part: Part = "test") -> dict[str, float]:
    """Per cent of the maps that somebody solves who knows nothing."""
    count, seed = {"train": (1000, 0), "validation": (250, 1), "test": (500, 2)}[part]
    maps = draw_maps(count, size, seed)
    return {name: 100 * float(same_path(p, maps.paths).double().mean()) for name, p in shortcuts(maps.costs).items()}


def path_problems(scale: str) -> list[Paths]:
    """Tables 2 and 3 of the paper."""
    options: dict = {} if scale == "cpu" else {"size": 12, "steps": 3000, "batch": 70, "table": "paths_paper"}
    textbook = ("plain, textbook",)
    hessians = ("Hessian", "Hessian, fixed", "Hessian per sample", *textbook)
    make: Callable[..., Paths] = lambda *args: Paths(*args, **options)  # noqa: E731
    problems = [
        make(kind, f"Bellman-Ford {kind.replace('_', ', ').upper()}", kind, 0, (2.0, 5.0, 12.0), hessians)
        for kind in ("for_l1", "for_l2", "while_l1", "while_l2")
    ]
    sampled = {"loss_score": "loss smoothed", "algorithm_score": "path smoothed", "fenchel_young": "Fenchel-Young"}
    for samples in (3, 10, 30):
        for kind, title in sampled.items():
            problems.append(make(f"{kind}_{samples}", f"{title}, {samples} samples", kind, samples, (), textbook))
    for samples in (4, 10, 30):
        name, title = f"algorithm_difference_{samples}", f"path smoothed, differences, {samples} samples"
        problems.append(make(name, title, "algorithm_difference", samples, (), hessians))
    return problems
