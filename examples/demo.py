"""Newton Losses on real handwritten digits: what one line in the Trainer does to the same training run.

    python -m examples.demo

Trains the same network with the same seeds, with and without ``NewtonLosses()``, prints two tables, and saves
the validation curves (curves.png) and every run (runs.json).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from examples.demo_arms import LEGEND, SETTINGS, Job
from examples.demo_report import plot, table
from examples.demo_runs import train_all


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Run the demo; return every run."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="runs of every arm (default 5)")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of a run (default 1500)")
    parser.add_argument("--workers", type=int, default=2, help="runs at the same time (default 2)")
    parser.add_argument("--out", type=Path, default=Path("demo_results"), help="folder for what is saved")
    options = parser.parse_args(arguments)

    jobs = [
        Job(setting, arm, seed, options.steps)
        for setting in SETTINGS
        for seed in range(options.seeds)
        for arm in setting.arms
    ]
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
        bar = progress.add_task("loading torch and Lightning", total=len(jobs) * options.steps)

        def advance(steps: int) -> None:
            progress.update(bar, advance=steps, description=f"training {len(jobs)} networks")

        runs = list(train_all(jobs, options.workers, advance))

    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "runs.json").write_text(json.dumps(runs, indent=1) + "\n")
    plot(runs, SETTINGS, options.out / "curves.png")
    console = Console()
    console.print("\nOn 2000 lists of test images, which no network has seen:\n", highlight=False)
    for setting in SETTINGS:
        console.print(table(runs, setting))
    console.print(LEGEND.format(workers=options.workers), highlight=False)
    console.print(f"\nSaved: {options.out / 'curves.png'}, {options.out / 'runs.json'}", highlight=False)
    return runs


if __name__ == "__main__":
    main()
