"""Write the results of all cases, or compare two files of results.

    python -m benchmarks.versions write new.pt
    python -m benchmarks.versions write new_from_old.pt --states old.pt
    python -m benchmarks.versions compare old.pt new.pt

Run ``write`` by the interpreter of each environment, from the root of one checkout: the cases are the same files, and
``newton_plugin`` is the one that is installed there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.versions.all_cases import GROUPS, all_cases
from benchmarks.versions.case import Case
from benchmarks.versions.compare import TOLERANCE, compare, table
from benchmarks.versions.installed import describe, installed

_NAMED = 20  # failures


def write(cases: Iterable[Case], states: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the cases on one thread, by deterministic algorithms.

    Args:
        cases: those to run.
        states: running states by case, saved by another version at the half of each case; None: each case goes on
            from its own.
    """
    saved: dict[str, Any] = {"package": installed(), "results": {}, "states": {}, "seconds": {}}
    with _repeatable():
        for case in cases:
            if case.key in saved["results"]:
                raise ValueError(f"two cases are called {case.key!r}")
            start = time.perf_counter()
            record = case.run(None if states is None else states.get(case.key))
            before = saved["seconds"].get(case.group, 0.0)
            saved["seconds"][case.group] = before + time.perf_counter() - start
            saved["results"][case.key] = record.entries
            if record.state is not None:
                saved["states"][case.key] = record.state
    return saved


@contextmanager
def _repeatable() -> Iterator[None]:
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.versions", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    writer = commands.add_parser("write", help="run all cases with the installed newton_plugin")
    writer.add_argument("out", type=Path)
    writer.add_argument("--states", type=Path, help="a file of another version; second halves begin from its states")
    writer.add_argument("--only", nargs="+", choices=list(GROUPS), help="these groups")
    writer.add_argument("--every", type=int, default=1, help="take every k-th case of each group")
    comparer = commands.add_parser("compare", help="compare two files; exit status 1 if any case differs")
    comparer.add_argument("old", type=Path)
    comparer.add_argument("new", type=Path)
    comparer.add_argument("--tolerance", type=float, default=TOLERANCE, help="relative, of float64 results")
    given = parser.parse_args(arguments)
    return _write(given) if given.command == "write" else _compare(given)


def _write(given: argparse.Namespace) -> int:
    print(describe(installed()), flush=True)
    states = None if given.states is None else torch.load(given.states, weights_only=True)["states"]
    saved = write(all_cases(given.only, given.every), states)
    torch.save(saved, given.out)
    for group, seconds in saved["seconds"].items():
        cases = sum(key.startswith(f"{group}:") for key in saved["results"])
        print(f"{group}: {cases} cases, {seconds:.1f} s")
    print(f"all: {len(saved['results'])} cases, {sum(saved['seconds'].values()):.1f} s, {len(saved['states'])} states")
    return 0


def _compare(given: argparse.Namespace) -> int:
    old, new = (torch.load(path, weights_only=True) for path in (given.old, given.new))
    for name, saved in (("old", old), ("new", new)):
        print(f"{name}: {describe(saved['package'])}")
    if old["package"] == new["package"]:
        print("Both files are of the same source: this measures the noise, and compares no versions.")
    groups = compare(old["results"], new["results"], given.tolerance)
    print(f"\n{table(groups)}")
    failures = [failure for group in groups.values() for failure in group.failures]
    for failure in failures[:_NAMED]:
        print(f"\n{failure}")
    if len(failures) > _NAMED:
        print(f"\nand {len(failures) - _NAMED} more")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
