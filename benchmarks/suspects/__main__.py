"""``python -m benchmarks.suspects --help``; what is measured stands in the package's docstring."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import benchmarks.suspects
import torch
from benchmarks.evidence.training.runs import Lines
from benchmarks.suspects.confident import is_installed
from benchmarks.suspects.report import report
from benchmarks.suspects.runs import complete
from benchmarks.suspects.tasks import TASKS

RESULTS = Path(__file__).parent.parent / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what has no line yet, and write the table."""
    parser = argparse.ArgumentParser(
        description=benchmarks.suspects.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS], metavar="TASK")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    lines = Lines(options.out / "suspects.jsonl")
    if not options.table:
        if not is_installed():
            print("cleanlab is not installed: confident learning is left out", flush=True)
        for name in options.tasks:
            start = time.process_time()
            for what in complete(TASKS[name], lines, is_installed()):
                print(f"{what}, {time.process_time() - start:.0f} s of CPU", flush=True)
                start = time.process_time()
    (options.out / "suspects.md").write_text(report(lines.by_run()))


if __name__ == "__main__":
    main()
