"""Runs every scenario on this rank, one after the other, and writes the outcome of each.

torchrun --standalone --nproc-per-node=2 -m tests.distributed.run_scenarios OUT [NAME ...]
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tests.distributed import collectives, gated, lagged
from tests.distributed.scenarios import SCENARIOS

assert all((collectives, gated, lagged))  # they add to the scenarios


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    outcome = {}
    for name in names or SCENARIOS:
        try:
            SCENARIOS[name](rank)
            outcome[name] = ""
        except BaseException:  # pytest's own failures are not Exceptions
            outcome[name] = traceback.format_exc()
        (out / f"rank{rank}.json").write_text(json.dumps(outcome))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
