"""What a curvature that is kept for k steps (``refresh_every``) does to accuracy, and to the time of a step.

    python -m benchmarks.refresh [--seeds 5] [--steps 800]    # train what is missing, time, write the tables
    python -m benchmarks.refresh --table                      # the tables from the rows

Lists of real digits as in :mod:`benchmarks.auto_damping`: an MLP scores n images, Adam 1e-2 with a cosine, batches of
32. All arms of a seed start from the same weights and see the same batches. Accuracy is on the *validation* images:
all ranks of a list right (2000 fixed lists). Time: steps of all arms of a loss, taken in turns in one process on
batches of one training; the ratio is to the plain step of the same turn. Results: results/refresh.json, refresh.md.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.auto_damping import LossFunction, lines, spread, validate
from examples.digit_lists import DigitLists
from torch import nn

import newton_plugin as npl
from newton_plugin.algorithms import RankingLoss

RESULTS = Path(__file__).parent / "results"
FIRST_SEED, BATCH, RATE = 3000, 32, 1e-2
EVERY = (1, 5, 10, 20)
TURNS, WARM_UP = 240, 40  # whole periods of every k, so that a mean over turns is fair

LOSSES: dict[str, tuple[LossFunction, int]] = {
    "NeuralSort, n = 10": (RankingLoss("neural_sort", temperature=0.1), 10),
    "logistic network, n = 5": (RankingLoss("sorting_network", layout="odd_even", steepness=10.0), 5),
}
CURVATURES: dict[str, Callable[[int], npl.LossHook]] = {
    "Hessian, damping 0.1": lambda k: npl.LossHook(curvature=npl.Hessian(refresh_every=k), damping=0.1),
    "Fisher, auto damping": lambda k: npl.LossHook(curvature=npl.EmpiricalFisher("mean", refresh_every=k)),
}
ARMS = [("plain", 0), *itertools.product(CURVATURES, EVERY)]


class Training:
    """One network in training, a step at a time: a loss of LOSSES; curvature and k; of so many steps in all."""

    def __init__(self, loss: str, arm: tuple[str, int], seed: int, steps: int) -> None:
        self.loss, self.n = LOSSES[loss]
        self.hook = CURVATURES[arm[0]](arm[1]) if arm[1] else None
        torch.manual_seed(seed)
        layers = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(-2))
        self.model = nn.Sequential(*layers)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.batches = iter(DigitLists("train", self.n, BATCH, steps, seed))

    def step(self) -> float:
        """One step; its seconds, without the drawing of the batch."""
        images, ranks = next(self.batches)
        start = time.perf_counter()
        loss = self.loss(self.model(images), ranks)
        if self.hook is not None:
            loss = self.hook(loss)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        seconds = time.perf_counter() - start
        self.schedule.step()
        return seconds


def train(loss: str, arm: tuple[str, int], seed: int, steps: int) -> dict[str, Any]:
    training = Training(loss, arm, seed, steps)
    for _ in range(steps):
        training.step()
    accuracy = validate(training.model, training.n)
    return {"loss": loss, "curvature": arm[0], "every": arm[1], "seed": seed, "steps": steps, "accuracy": accuracy}


def ratios(loss: str) -> dict[str, dict[str, float]]:
    """By arm: the median ratio of a step's time to plain's of the same turn; and of 20 steps, refreshes included."""
    trainings = {arm: Training(loss, arm, FIRST_SEED, WARM_UP + TURNS) for arm in ARMS}
    seconds = np.array([[t.step() for t in trainings.values()] for _ in range(WARM_UP + TURNS)])[WARM_UP:]
    periods = seconds.reshape(-1, max(EVERY), len(ARMS)).sum(1)
    step, period = (np.median(s / s[:, :1], axis=0).tolist() for s in (seconds, periods))
    return {f"{c}, {k}": {"step": step[i], "period": period[i]} for i, (c, k) in enumerate(ARMS)}


def interval(differences: list[float]) -> str:
    """Mean of paired differences and its 95 % interval, by 10,000 resamplings of the seeds."""
    values = np.array(differences)
    means = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(-1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{values.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def table(report: dict[str, Any]) -> str:
    """Markdown; an arm holds the seeds of its rows."""
    by_arm: dict[tuple[str, str, int], dict[int, float]] = {}
    for r in report["rows"]:
        by_arm.setdefault((r["loss"], r["curvature"], r["every"]), {})[r["seed"]] = r["accuracy"]
    header = ["loss", "curvature", "refresh_every", "accuracy, %", "difference to 1", "one step", "20 steps"]
    rows = []
    for (loss, curvature, every), found in by_arm.items():
        base = by_arm[loss, curvature, min(every, 1)]
        difference = interval([v - base[seed] for seed, v in found.items()]) if every > 1 else ""
        times = report["ratios"].get(loss, {}).get(f"{curvature}, {every}", {"step": np.nan, "period": np.nan})
        timed = [f"{times['step']:.2f}", f"{times['period']:.2f}"] if every else ["1", "1"]
        rows.append([loss, curvature, str(every or ""), spread(list(found.values())), difference, *timed])
    seeds, steps = len({r["seed"] for r in report["rows"]}), report["rows"][0]["steps"]
    about = (
        f"Made by `python -m benchmarks.refresh --table`. {seeds} seeds, {steps} steps. Accuracy: lists of validation "
        "images ranked fully right, mean ± standard deviation over the seeds; differences to refresh_every=1 are "
        "paired by seed, with the 95 % interval of a bootstrap. Times are medians of ratios to the plain steps beside "
        "them: of one step, and of twenty, refreshes included."
    )
    return f"{about}\n\n{lines(header, rows)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--table", action="store_true", help="train and time nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = options.out / "refresh.json"
    report = json.loads(path.read_text()) if path.exists() else {"torch": str(torch.__version__), "rows": []}
    if not options.table:
        done = {(r["loss"], r["curvature"], r["every"], r["seed"], r["steps"]) for r in report["rows"]}
        for loss, arm, s in itertools.product(LOSSES, ARMS, range(FIRST_SEED, FIRST_SEED + options.seeds)):
            if (loss, *arm, s, options.steps) not in done:
                report["rows"].append(train(loss, arm, s, options.steps))
                print(report["rows"][-1], flush=True)
        report["ratios"] = {loss: ratios(loss) for loss in LOSSES}
        path.write_text(json.dumps(report, indent=1) + "\n")
    (options.out / "refresh.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
