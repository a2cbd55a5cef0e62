"""Ranking digits on two ranks: ``sync="lagged"`` against ``sync=True`` and one process, paired seed by seed.

Network, losses, data and schedule are those of ``examples/demo.py`` (10 images, temperature 0.1, Adam 1e-2). Each rank
has half of every batch, and all arms see the same batches in the same order. Accuracy is that on test lists.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from examples.demo_arms import LONG
from examples.rank_digits import DigitRankingData, RankDigits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import newton_plugin as npl

__all__ = ["ARMS", "LOSSES", "train_all"]

LOSSES = ("textbook", "neural_sort")
MORE = {"textbook": 2}  # times as many seeds: its float32 fails now and then, in any arm
ARMS: dict[str, bool | str] = {"one process": False, "sync=True": True, "sync='lagged'": "lagged"}


def train(loss: str, sync: Any, seed: int, steps: int, together: bool) -> dict[str, float]:
    """Train one network; its accuracy on the test lists."""
    torch.manual_seed(seed)
    data = DigitRankingData(LONG.n, steps=steps, seed=1000 + seed)
    task = RankDigits(loss, LONG.temperature, LONG.learning_rate, steps)  # type: ignore[arg-type]
    network: nn.Module = DistributedDataParallel(task.network) if together else task.network
    optimizer = torch.optim.Adam(task.network.parameters(), lr=LONG.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    hook = npl.LossHook(sync=sync)
    for images, ranks in data.train:
        if together:
            own = slice(dist.get_rank(), None, dist.get_world_size())
            images, ranks = images[own], ranks[own]
        optimizer.zero_grad()
        value = task.ranking_loss(network(images).squeeze(-1), ranks)
        hook(value).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        for images, ranks in data.test:
            scores = task(images)
            task.full.update(scores, ranks)
            task.elements.update(scores, ranks)
        # Each metric would add up over the ranks, which have all seen the same lists: the share stays the same.
        full, elements = float(task.full.compute()), float(task.elements.compute())
    return {"full": full, "elements": elements}


def train_all(seeds: int, steps: int) -> list[dict[str, Any]]:
    """On one rank: every arm; rank 0's results. Runs of one process are the same on all ranks."""
    rows = []
    for loss in LOSSES:
        for seed in range(seeds * MORE.get(loss, 1)):
            for name, sync in ARMS.items():
                result = train(loss, sync, seed, steps, together=name != "one process")
                rows.append({"loss": loss, "arm": name, "seed": seed, "steps": steps, **result})
                if dist.get_rank() == 0:
                    print(rows[-1], flush=True)
    return rows
