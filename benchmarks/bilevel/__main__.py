"""Bilevel methods at equal oracle calls, what a step costs, and hypergradients beside TorchOpt.

    python -m benchmarks.bilevel                          # everything
    python -m benchmarks.bilevel --only cost peers        # these parts; the others keep their rows

One process, one thread. Methods get the same number of oracle calls. A call is a gradient of either loss, or a product
of a second derivative with a vector; the calls of the warm start count. The settings below were searched on seeds that
are not reported: on the quadratic, lr_upper and beta on grids of at least four by two, by a NumPy twin of the problem
and the methods; on the cleaning task, three or four values of lr_upper; on the AUC task, three values with a fiftieth
of the calls (StocBiO: four values with all calls). lr_upper decays linearly to zero. Times are medians over interleaved
rounds, ratios medians of the per-round ratios. Writes results/bilevel.json and results/bilevel.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.bilevel import peers
from benchmarks.bilevel.problems import Problem, auc, cleaning, quadratic
from benchmarks.tables import markdown
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from newton_plugin.bilevel import BOREP, MASOBA, AccBO, StocBiO

RESULTS = Path(__file__).parents[1] / "results"
SEEDS = (1, 2, 3, 4, 5)
BASELINE = "one level, SGD"
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AccBO storm": (AccBO, {}),
    "AccBO ema": (AccBO, {"estimator": "ema"}),
    "AccBO ema, settings of storm": (AccBO, {"estimator": "ema"}),
    "MASOBA": (MASOBA, {}),
    "BOREP": (BOREP, {}),
    "StocBiO": (StocBiO, {}),
}
# Normalised methods move by lr_upper, the others by lr_upper times the hypergradient.
SETTINGS: dict[str, dict[str, dict[str, float]]] = {
    "quadratic, no lower noise": {
        "AccBO storm": {"lr_upper": 0.1, "beta": 0.999},
        "AccBO ema": {"lr_upper": 0.01, "beta": 0.95},
        "AccBO ema, settings of storm": {"lr_upper": 0.1, "beta": 0.999},
        "MASOBA": {"lr_upper": 0.01, "beta": 0.9},
    },
    "quadratic, lower noise": {
        "AccBO storm": {"lr_upper": 0.03, "beta": 0.99},
        "AccBO ema": {"lr_upper": 0.01, "beta": 0.95},
        "AccBO ema, settings of storm": {"lr_upper": 0.03, "beta": 0.99},
        "MASOBA": {"lr_upper": 0.01, "beta": 0.9},
    },
    "cleaning": {
        "AccBO storm": {"lr_upper": 0.1},
        "AccBO ema": {"lr_upper": 0.1},
        "MASOBA": {"lr_upper": 30.0},
        "BOREP": {"lr_upper": 0.3},
        "StocBiO": {"lr_upper": 100.0},
    },
    "auc": {
        "AccBO storm": {"lr_upper": 0.1},
        "AccBO ema": {"lr_upper": 0.1},
        "MASOBA": {"lr_upper": 0.1},
        "BOREP": {"lr_upper": 0.1},
        "StocBiO": {"lr_upper": 0.03},
    },
}
# part -> (problem by seed, calls, lr_lower, whether less is better)
TASKS: dict[str, tuple[Callable[[int], Problem], int, float, bool]] = {
    "quadratic, no lower noise": (partial(quadratic, lower_noise=0.0), 40_000, 0.3, True),
    "quadratic, lower noise": (partial(quadratic, lower_noise=3.0), 40_000, 0.3, True),
    "cleaning": (cleaning, 5_000, 0.5, False),
    "auc": (auc, 5_000, 0.3, False),
}


def train(name: str, problem: Problem, budget: int, lr_lower: float, choice: dict[str, float]) -> dict[str, float]:
    """One run of one method: its metrics, calls and seconds."""
    method, options = METHODS[name]
    optimizer = method(problem.upper, problem.lower, lr_lower=lr_lower, **options, **choice)
    start = time.perf_counter()

    def lower_closure() -> Tensor:
        problem.draw()
        return problem.lower_closure()

    if problem.warm_start:
        optimizer.warm_start(lower_closure, problem.warm_start)
    while optimizer.calls.total < budget:
        for group in optimizer.param_groups:
            if group["level"] == "upper":
                group["lr"] = choice["lr_upper"] * max(1 - optimizer.calls.total / budget, 1e-3)
        problem.draw()
        optimizer.step(problem.upper_closure, problem.lower_closure)
    return {**problem.metrics(), "calls": optimizer.calls.total, "seconds": time.perf_counter() - start}


def baseline(task: str, seed: int, steps: int) -> dict[str, float]:
    """One level only, by SGD: uniform weights on the cleaning task, cross-entropy on the AUC task."""
    problem = cleaning(seed) if task == "cleaning" else auc(seed)
    params = problem.lower if task == "cleaning" else problem.upper[:-2]
    loss = problem.lower_closure if task == "cleaning" else problem.plain_closure
    optimizer = torch.optim.SGD(params, lr=0.5)
    for _ in range(steps):
        problem.draw()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    return problem.metrics()


def compare(task: str, name: str, scale: float) -> dict[str, Any]:
    """One method on one task, over the seeds."""
    make, budget, lr_lower, less = TASKS[task]
    budget = int(budget * scale)
    if name == BASELINE:
        runs = [baseline(task, seed, budget) for seed in SEEDS]
        row: dict[str, Any] = {"method": name, "calls": budget}
    else:
        settings = SETTINGS[task][name]
        runs = [train(name, make(seed), budget, lr_lower, settings) for seed in SEEDS]
        row = {"method": name, **settings, "calls": budget}
    for key in [k for k in runs[0] if k not in ("calls", "seconds")]:
        values = [run[key] for run in runs]
        row |= {key: statistics.mean(values), f"{key} sd": statistics.stdev(values)}
        row[f"{key} worst"] = (max if less else min)(values)
    if "seconds" in runs[0]:
        row["seconds"] = statistics.median(run["seconds"] for run in runs)
    return row


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round, all of them round by round."""
    for f in functions.values():
        f(), f()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, f in functions.items():
            start = time.perf_counter()
            f()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def step_cost(rounds: int) -> list[dict[str, Any]]:
    """A step of each method in plain SGD steps of the lower level, on compute-bound networks, float32."""
    rows = []
    for widths, batch in (((784, 512, 10), 256), ((256, 512, 512, 512, 10), 256), ((64, 512, 512, 512, 10), 512)):
        torch.manual_seed(0)
        layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())][:-1]
        net, x = nn.Sequential(*layers), torch.zeros(batch, requires_grad=True)
        z, z_val = torch.randn(2, batch, widths[0]).unbind()
        labels = torch.randint(0, 10, (batch,))

        def lower(net: nn.Module = net, x: Tensor = x, z: Tensor = z, labels: Tensor = labels) -> Tensor:
            return (x.sigmoid() * cross_entropy(net(z), labels, reduction="none")).mean()

        def upper(net: nn.Module = net, z: Tensor = z_val, labels: Tensor = labels) -> Tensor:
            return cross_entropy(net(z), labels)

        sgd = torch.optim.SGD(net.parameters(), lr=1e-3)

        def plain(sgd: Any = sgd, lower: Any = lower) -> None:
            sgd.zero_grad()
            lower().backward()
            sgd.step()

        functions: dict[str, Callable[[], Any]] = {"plain SGD": plain}
        for name in SETTINGS["auc"]:
            method, options = METHODS[name]
            ways = ("autograd", "finite_difference") if name in ("AccBO storm", "MASOBA") else ("autograd",)
            for hvp in ways:
                optimizer = method([x], net.parameters(), lr_upper=1e-3, lr_lower=1e-3, hvp=hvp, **options)
                functions[f"{name}, {hvp}"] = partial(optimizer.step, upper, lower)
        seconds = interleaved(functions, rounds)
        for name, values in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(values, seconds["plain SGD"], strict=True))
            shape = "-".join(map(str, widths))
            row = {"network": shape, "batch": batch, "method": name, "ms": 1e3 * statistics.median(values)}
            rows.append({**row, "plain SGD steps": ratio})
    return rows


def compare_peers(rounds: int, iterations: int = 20) -> list[dict[str, Any]]:
    """One hypergradient with so many products of the solve, setup included, and its error at that many."""
    rows = []
    for hidden, n in ((None, 100), (None, 1000), (64, 100), (64, 1000)):
        problem = peers.WeightedClassifier(hidden, n)
        reference = problem.reference()
        size = problem.largest_eigenvalue()
        functions: dict[str, Callable[[], Any]] = {"ours, cg": peers.ours(problem, iterations)}
        try:
            functions = {"TorchOpt, cg": peers.torchopt_cg(problem, iterations), **functions}
        except ModuleNotFoundError:
            print("torchopt is not installed: pip install torchopt")
        functions["ours, neumann"] = peers.ours(problem, iterations, solver="neumann", scale=1 / size)
        functions["fixed point (written here)"] = peers.fixed_point(problem, iterations, 1 / size)
        functions["ours, cg, finite differences"] = peers.ours(problem, iterations, hvp="finite_difference")
        seconds = interleaved(functions, rounds)
        first = next(iter(functions))
        for name, f in functions.items():
            error = float((f().double() - reference).norm() / reference.norm())
            ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[first], strict=True))
            row = {"lower model": "linear" if hidden is None else f"64-{hidden}-10", "samples": n, "method": name}
            rows.append({**row, "ms": 1e3 * statistics.median(seconds[name]), "time ratio": ratio, "error": error})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bilevel", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=[*TASKS, "cost", "peers"], default=[*TASKS, "cost", "peers"])
    parser.add_argument(
        "--methods", nargs="+", choices=[*METHODS, BASELINE], help="of the tasks; the others keep theirs"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--scale", type=float, default=1.0, help="of the budgets of calls: 0.02 for a look")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".*functorch.*", FutureWarning)  # TorchOpt's
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "bilevel.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for part in options.only:
        if part not in TASKS:
            rows = step_cost(options.rounds) if part == "cost" else compare_peers(options.rounds)
            save(options.out, results, part, rows)
            continue
        for name in [*SETTINGS[part], *([BASELINE] if part in ("cleaning", "auc") else [])]:
            if options.methods is None or name in options.methods:
                kept = {row["method"]: row for row in results.get(part, [])}
                kept[name] = compare(part, name, options.scale)
                save(options.out, results, part, list(kept.values()))


def save(folder: Path, results: dict[str, Any], part: str, rows: list[dict[str, Any]]) -> None:
    """Keep the rows of a part, beside those of the others, and print them."""
    results[part] = rows
    cpu = platform.processor() or platform.machine()
    results["machine"] = {"torch": torch.__version__, "threads": 1, "cpu": cpu}
    (folder / "bilevel.json").write_text(json.dumps(results, indent=1) + "\n")
    parts = [f"## {name}\n\n{markdown(rows)}" for name, rows in results.items() if name != "machine"]
    (folder / "bilevel.md").write_text("\n\n".join(parts) + "\n")
    print(f"{part}\n{markdown(rows)}", flush=True)


if __name__ == "__main__":
    main()
