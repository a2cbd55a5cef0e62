"""Milliseconds of a step, the arms in turn, step by step, under torch's DistributedDataParallel."""

from __future__ import annotations

import statistics
import time
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.ranks.counts import BATCH, Heads
from torch.nn.parallel import DistributedDataParallel

__all__ = ["SETTINGS", "measure"]

# Title, layers at the loss, features of each, and the rule.
SETTINGS: list[tuple[str, int, int, dict[str, Any]]] = [
    ("default, m = 10", 1, 10, {}),
    ("norm, m = 10", 1, 10, {"curvature": "norm"}),
    ("default, 3 layers, m = 10", 3, 10, {}),
    ("mean, m = 10", 1, 10, {"structure": "mean"}),
    ("mean, m = 100", 1, 100, {"structure": "mean"}),
    ("mean, m = 500", 1, 500, {"structure": "mean"}),
    ("mean, m = 2,000", 1, 2000, {"structure": "mean"}),
    ("hessian, m = 10", 1, 10, {"curvature": "hessian"}),
]


def measure(packages: dict[str, ModuleType], rounds: int) -> list[dict[str, Any]]:
    """On one rank: of every arm of every setting the median, and the time of the fastest tenth of its steps."""
    rows = []
    for title, heads, m, options in SETTINGS:
        torch.manual_seed(0)
        network = Heads(heads, m)
        model = DistributedDataParallel(network)
        new = packages["new"]
        hooks: dict[str, Any] = {"no hook": None, "sync=False": new.LossHook(**options, sync=False)}
        hooks |= {f"{version}, sync=True": package.LossHook(**options) for version, package in packages.items()}
        rounds_of = [hooks]
        if "mean" not in title and "hessian" not in title:
            # A round of its own: what a lagged step leaves to arrive would be taken in by the arm that follows it.
            rounds_of.append(
                {"sync=False beside it": hooks["sync=False"], "new, lagged": new.LossHook(**options, sync="lagged")}
            )
        x, t = torch.randn(BATCH, 64), torch.randint(0, m, (BATCH,))
        row: dict[str, Any] = {"setting": title, "ranks": dist.get_world_size()}
        for arms in rounds_of:
            times: dict[str, list[float]] = {name: [] for name in arms}
            for k in range(rounds + 5):
                for name, hook in arms.items():
                    model.zero_grad()
                    dist.barrier()
                    start = time.perf_counter()
                    loss = network.loss(model(x), t)
                    (loss if hook is None else hook(loss)).backward()
                    if k >= 5:
                        times[name].append(1e3 * (time.perf_counter() - start))
            for name, values in times.items():
                row[name] = {"median": statistics.median(values), "tenth": statistics.quantiles(values, n=10)[0]}
        rows.append(row)
    return rows
