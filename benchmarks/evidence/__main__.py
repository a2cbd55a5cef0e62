"""Train what has no line yet, and make the tables: ``python -m benchmarks.evidence --help``.

    python -m benchmarks.evidence search [--seeds 4]            # candidates for a better rule, on validation data
    python -m benchmarks.evidence tune --table ranking          # hyper-parameters
    python -m benchmarks.evidence report --table ranking        # sixteen seeds of what tuning chose
    python -m benchmarks.evidence noretune --table no_harm      # sixteen seeds at the rate that tuning chose for plain
    python -m benchmarks.evidence fresh --table no_harm         # the same on sixteen seeds that nobody has looked at
    python -m benchmarks.evidence time --table ranking          # milliseconds a step, on a quiet machine
    python -m benchmarks.evidence damping                       # accuracy over fixed dampings, validation data
    python -m benchmarks.evidence fixed --scale paper --data-dir DIR --device cuda --steps 3000 --problems neural_sort_5
                                                                # given learning rates, no tuning: the paper's scale
    python -m benchmarks.evidence why                           # signal and noise, a minute
    python -m benchmarks.evidence fields                        # gradients and steps as arrows, seconds
    python -m benchmarks.evidence tables                        # no training: Markdown from the lines

Interrupt it and start it again as you like; ``--share 1/2`` and ``--share 2/2`` split the work over two processes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from benchmarks.evidence.live.plan import at_rate_of_plain
from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.problems.registry import problems
from benchmarks.evidence.tables.fields import write_fields
from benchmarks.evidence.tables.write import write_tables
from benchmarks.evidence.training import plan
from benchmarks.evidence.training.arms import ARMS, CANDIDATES
from benchmarks.evidence.training.damping import DAMPED, damping_groups
from benchmarks.evidence.training.damping import PROBLEMS as DAMPING_PROBLEMS
from benchmarks.evidence.training.fixed import FIXED_ARMS, fixed_groups
from benchmarks.evidence.training.mechanism import append_mechanism
from benchmarks.evidence.training.runs import Lines, Run
from benchmarks.evidence.training.timing import append_times
from benchmarks.evidence.training.train import train

PLAIN_RATES = ("noretune", "fresh")  # every arm at the learning rate that tuning chose for plain
RESULTS = Path(__file__).parent.parent / "results" / "evidence"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what",
        choices=[
            "search",
            "tune",
            "report",
            "noretune",
            "fresh",
            "damping",
            "fixed",
            "time",
            "why",
            "fields",
            "tables",
        ],
    )
    parser.add_argument("--table", help="the problems of one table: ranking, paths, no_harm, more, beyond")
    parser.add_argument("--problems", nargs="+", help="some problems by name")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *CANDIDATES], metavar="ARM", help="some arms by name")
    parser.add_argument("--seeds", type=int, help="of the search: 4 to screen, 8 (the default) to choose; fixed: 3")
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-3, 3e-3], help="learning rates of fixed")
    parser.add_argument("--scale", choices=["cpu", "paper"], default="cpu")
    parser.add_argument("--data-dir", help="a folder with MNIST's IDX files, in place of scikit-learn's digits")
    parser.add_argument("--device", default="cpu", help="where to train")
    parser.add_argument("--steps", type=int, help="of a training, in place of the scale's own; told in the lines")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each arm that are timed")
    parser.add_argument("--share", default="1/1", help="i/k: the i-th of k processes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True  # batches have one shape: the fastest convolution is looked for once
    data = "digits" if options.data_dir is None else Path(options.data_dir).name
    every = problems(options.scale, options.data_dir, options.device)
    if options.steps is not None:
        every = {name: replace(problem, steps=options.steps) for name, problem in every.items()}
    if options.what == "tables":
        write_tables(options.out, every)
        return
    if options.what == "fields":
        print(*write_fields(options.out), sep="\n")
        return
    if options.what == "time":
        for name in options.problems or [name for name, p in every.items() if p.table == (options.table or p.table)]:
            times = append_times(options.out / "times.jsonl", every[name], options.rounds)
            print(name, {arm: round(ms, 2) for arm, ms in times.items()}, flush=True)
        return
    if options.what == "why":
        for name in options.problems or [*plan.PANEL]:
            append_mechanism(options.out / "mechanism.jsonl", every[name])
        return
    i, k = (int(part) for part in options.share.split("/"))
    for number, group in enumerate(_groups(options, every, data)):
        if number % k == i - 1:
            problem = every[group[0].problem]
            _train(problem, group, _lines(options, problem), options.device)


def _lines(options: argparse.Namespace, problem: Problem) -> Lines:
    name = options.what if options.what in ("search", "damping") else problem.table
    return Lines(options.out / f"{f'{options.what}_' if options.what in PLAIN_RATES else ''}{name}.jsonl")


def _groups(options: argparse.Namespace, every: dict[str, Problem], data: str) -> Iterator[list[Run]]:
    """Runs that are trained together; what a later one needs to know is read when its turn comes."""
    if options.what == "search":
        names = options.problems or plan.PANEL
        for arm in options.arms or [a for a in (*ARMS, *CANDIDATES) if a != "plain, textbook"]:
            for name in names:
                if arm not in every[name].without:
                    yield plan.search_runs(every[name], arm, options.seeds or 8, data)
        return
    if options.what == "damping":
        for name in options.problems or DAMPING_PROBLEMS:
            chosen = Lines(options.out / f"{every[name].table}.jsonl").by_run()
            yield from damping_groups(every[name], plan.sharpness(every[name], data, options.scale, chosen), data)
        return
    names = options.problems or [name for name, p in every.items() if p.table == (options.table or p.table)]
    if options.what == "fixed":
        arms, seeds = options.arms or FIXED_ARMS, options.seeds or 3
        for name in names:
            small = problems()[name]
            chosen = Lines(RESULTS / f"{small.table}.jsonl").by_run()
            yield from fixed_groups(every[name], small, chosen, arms, options.rates, seeds, data)
        return
    if options.what == "tune":
        for name in names:
            runs = plan.sharpness_runs(every[name], data, options.scale)
            for sharp in dict.fromkeys(run.sharpness for run in runs):
                yield [run for run in runs if run.sharpness == sharp]
    for arm in options.arms or ARMS:
        for name in names:
            if arm in every[name].without:
                continue
            try:
                yield _group(options, every[name], arm, data)
            except LookupError as error:
                print(f"left out: {name}, {arm}: {error}", flush=True)


def _group(options: argparse.Namespace, problem: Problem, arm: str, data: str) -> list[Run]:
    done = Lines(options.out / f"{problem.table}.jsonl").by_run()
    if options.what in PLAIN_RATES:
        return at_rate_of_plain(problem, arm, done, data, options.scale, options.what == "fresh")
    sharp = plan.sharpness(problem, data, options.scale, done)
    if options.what == "tune":
        return plan.tuning_runs(problem, arm, sharp, data, options.scale)
    return plan.report_runs(problem, plan.chosen(problem, arm, sharp, data, options.scale, done), data, options.scale)


def _train(problem: Problem, runs: Sequence[Run], lines: Lines, device: str) -> None:
    missing = lines.missing(runs)
    if not missing:
        return
    start = time.process_time()
    arm = {**ARMS, **CANDIDATES, **DAMPED}[missing[0].arm]
    for run, result in zip(missing, train(problem, arm, missing, device), strict=True):
        lines.append(run, result)
    seconds = time.process_time() - start
    first = missing[0]
    print(f"{first.purpose}: {first.problem}, {first.arm}: {len(missing)} runs, {seconds:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
