"""Train what has no line yet of the live problems: ``python -m benchmarks.evidence.live --help``.

    python -m benchmarks.evidence.live tune       # six configurations of every arm, validation data
    python -m benchmarks.evidence.live report     # sixteen seeds of what tuning chose
    python -m benchmarks.evidence.live fresh      # the same on sixteen seeds that nobody has looked at
    python -m benchmarks.evidence.live noretune   # sixteen seeds of every arm at the rate that tuning chose for plain

Interrupt it and start it again as you like; ``--share 1/2`` and ``--share 2/2`` split the work over two processes.
Lines of noretune go to a file of their own. A run that report has trained already is copied from there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks.evidence.live import problems
from benchmarks.evidence.live.plan import at_rate_of_plain, report_runs, tuning_runs
from benchmarks.evidence.live.problems import LiveProblem
from benchmarks.evidence.live.train import Training
from benchmarks.evidence.training.arms import ARMS
from benchmarks.evidence.training.runs import Lines, Run

RESULTS = Path(__file__).parent.parent.parent / "results" / "evidence"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tune", "report", "noretune", "fresh"])
    parser.add_argument("--problems", nargs="+", choices=problems.LIVE, default=[*problems.LIVE], metavar="PROBLEM")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS], metavar="ARM")
    parser.add_argument("--share", default="1/1", help="i/k: the i-th of k processes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    i, k = (int(part) for part in options.share.split("/"))
    pairs = [(problems.LIVE[name], arm) for arm in options.arms for name in options.problems]
    for problem, arm in [pair for pair in pairs if pair[1] not in pair[0].without][i - 1 :: k]:
        _train(problem, arm, options.what, options.out)


def _train(problem: LiveProblem, arm: str, what: str, out: Path) -> None:
    """The runs of one arm on one problem that have no line yet."""
    table = Lines(out / f"{problem.table}.jsonl")
    lines = Lines(out / f"{what}_{problem.table}.jsonl") if what in ("noretune", "fresh") else table
    known = {} if what == "tune" else table.by_run()
    try:
        runs = _runs(problem, arm, what, table)
    except LookupError as error:
        print(f"left out: {problem.name}, {arm}: {error}", flush=True)
        return
    start, missing = time.process_time(), lines.missing(runs)
    for run in missing:
        lines.append(run, known[run] if run in known else Training(problem, ARMS[arm], run).result())
    seconds = time.process_time() - start
    print(f"{what}: {problem.name}, {arm}: {len(missing)} runs, {seconds:.0f} s of CPU", flush=True)


def _runs(problem: LiveProblem, arm: str, what: str, table: Lines) -> list[Run]:
    if what == "tune":
        return tuning_runs(problem, arm)
    if what == "report":
        return report_runs(problem, arm, table.by_run())
    return at_rate_of_plain(problem, arm, table.by_run(), fresh=what == "fresh")


if __name__ == "__main__":
    main()
