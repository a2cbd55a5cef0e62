"""What averaging the curvature costs as ranks and outputs grow.

    python -m benchmarks.ranks            # several minutes; writes benchmarks/results/ranks.md and .json

A step of torch's DistributedDataParallel (gloo, one thread a rank) with the hook at ``sync=True`` against the same with
``sync=False``, interleaved in one process group; medians. gloo moves tensors within one machine here, so the times do
not carry over to a cluster; the bytes do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import newton_plugin as npl

RESULTS = Path(__file__).parent / "results"
RANKS, WIDTHS, BATCH = (1, 2, 4), (10, 100, 500, 2000), 64


def measure(rounds: int) -> list[dict[str, float]]:
    """On one rank: medians for every width."""
    rows = []
    for m in WIDTHS:
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, m)))
        hooks = {
            "without": None,
            "local": npl.LossHook(structure="mean", sync=False),
            "sync": npl.LossHook(structure="mean"),
        }
        x, t = torch.randn(BATCH, 64), torch.randint(0, m, (BATCH,))
        times: dict[str, list[float]] = {name: [] for name in hooks}
        for k in range(rounds + 3):
            for name, hook in hooks.items():
                model.zero_grad()
                dist.barrier()
                start = time.perf_counter()
                loss = nn.functional.cross_entropy(model(x), t)
                (loss if hook is None else hook(loss)).backward()
                if k >= 3:
                    times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(values) for name, values in times.items()}
        payload = 8 * (m * m + 1 if m <= 1024 else BATCH * m)
        rows.append({"m": m, "ranks": dist.get_world_size(), "bytes": payload, **medians})
    return rows


def worker(out: Path, rounds: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rows = measure(rounds)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(rows))
    dist.destroy_process_group()


def table(rows: list[dict[str, float]]) -> str:
    lines = [
        "# What averaging the curvature over ranks costs",
        "",
        f"Fisher, batches of {BATCH} samples a rank, network 64-512-m, gloo on one machine of {os.cpu_count()} cores,",
        "one thread a rank (4 ranks share the cores). Step = forward, hook, backward with DDP's own all-reduce of the",
        "parameters' gradients. Medians; `python -m benchmarks.ranks`.",
        "",
        "| m | ranks | sent by each rank | step without the hook | hook, sync=False | hook, sync=True | sync costs |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        share = f"{r['bytes'] / 1e3:.1f} kB" if r["ranks"] > 1 else "nothing"
        lines.append(
            f"| {r['m']} | {r['ranks']} | {share} | {1e3 * r['without']:.2f} ms | {r['local'] / r['without']:.2f}x | "
            f"{r['sync'] / r['without']:.2f}x | {1e3 * (r['sync'] - r['local']):+.2f} ms |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments.rounds)
        return
    rows = []
    part = RESULTS / "ranks.part.json"
    for ranks in RANKS:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        own = ["-m", "benchmarks.ranks", "--worker", str(part), "--rounds", str(arguments.rounds)]
        subprocess.run([sys.executable, *launch, *own], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows += json.loads(part.read_text())
        part.unlink()
    (RESULTS / "ranks.json").write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    (RESULTS / "ranks.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
