"""What averaging the curvature over ranks costs, and what ``sync="lagged"`` does to a training.

    python -m benchmarks.ranks                    # half an hour; writes benchmarks/results/ranks.md and .json
    python -m benchmarks.ranks --before PATH      # beside another version of the package, PATH its src folder
    python -m benchmarks.ranks --only times       # or counts, demo: the other parts stay as they were

gloo moves tensors within one machine here, so the times do not carry over to a cluster; collectives and bytes do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.ranks import counts, demo, times
from benchmarks.ranks.report import page
from benchmarks.ranks.versions import load

import newton_plugin

RESULTS = Path(__file__).parent.parent / "results"
PARTS = ("counts", "times", "demo")


def worker(part: str, out: Path, options: argparse.Namespace) -> None:
    """One part on one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    packages = {"new": newton_plugin} | ({"before": load(options.before)} if options.before else {})
    if part == "counts":
        rows: list[dict[str, Any]] = counts.count(packages)
    elif part == "times":
        rows = times.measure(packages, options.rounds)
    else:
        rows = demo.train_all(options.seeds, options.steps)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(rows))
    dist.destroy_process_group()


def launch(part: str, ranks: int, arguments: list[str]) -> list[dict[str, Any]]:
    """One part on so many ranks."""
    out = RESULTS / "ranks.part.json"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    own = ["-m", "benchmarks.ranks", *arguments, "--worker", part, str(out)]
    subprocess.run([sys.executable, *torchrun, *own], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = json.loads(out.read_text())
    out.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--before", type=Path, help="the src folder of another version of the package")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker[0], Path(options.worker[1]), options)
        return
    kept = RESULTS / "ranks.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    results["torch"] = torch.__version__
    given = [f"--{name}={getattr(options, name)}" for name in ("rounds", "seeds", "steps")]
    given += [f"--before={options.before}"] if options.before else []
    for part in options.only:
        results[part] = [row for ranks in ((2, 4) if part == "times" else (2,)) for row in launch(part, ranks, given)]
    kept.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "ranks.md").write_text(page(results))


if __name__ == "__main__":
    main()
