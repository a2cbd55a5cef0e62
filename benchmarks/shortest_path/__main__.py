"""Shortest paths side by side: exact solvers, and losses on paths, forward and backward.

    python -m benchmarks.shortest_path [--quick]       # time and agreement
    python -m benchmarks.shortest_path --train 3       # does it learn: generated maps, that many seeds

One process, one thread, methods interleaved round by round; a figure is the median of the rounds, and its ratio the
median of the per-round ratios. "least" is the shortest round, the better guess where other work
shares the machine. Setup (building graphs, copying) is inside the times; compiling is reported apart.
Writes results/shortest_path.json and .md, or results/shortest_path_training.jsonl and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks.shortest_path.peers import c_dijkstra, csgraph, numpy_wavefront, published_bellman_ford, pyepo_loss
from benchmarks.tables import markdown
from examples.terrain import COSTS, draw_terrains
from torch import Tensor

from newton_plugin.algorithms import FenchelYoungLoss, StochasticSmoothing, relaxed_bellman_ford, shortest_path

RESULTS = Path(__file__).parents[1] / "results"
Row = dict[str, object]


def rounds(functions: dict[str, Callable[[], object]], budget: float, least: int = 3) -> dict[str, list[float]]:
    """Seconds of each function, interleaved, after one call to warm up."""
    for f in functions.values():
        f()
    times: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    while len(next(iter(times.values()))) < least or time.perf_counter() - start < budget:
        for name, f in functions.items():
            began = time.perf_counter()
            f()
            times[name].append(time.perf_counter() - began)
    return times


def compare_exact(kind: str, size: int, batch: int, budget: float) -> list[Row]:
    """Microseconds a map, and whether distances and paths are those of the first solver."""
    g = torch.Generator().manual_seed(0)
    if kind == "terrains":
        costs = torch.tensor(COSTS, dtype=torch.float64)[draw_terrains(batch, size, g)]
    else:
        costs = torch.rand(batch, size, size, generator=g, dtype=torch.float64) + 0.1
    few = costs[: max(1, batch // 10)]  # for the slow ones
    solvers: dict[str, tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
        "ours, numba": (costs, lambda c: shortest_path(c, backend="numba")),
        "ours, torch": (costs, lambda c: shortest_path(c, backend="torch")),
        "numpy wavefront": (costs, numpy_wavefront),
        "scipy csgraph, a loop": (few, csgraph),
    }
    reference = c_dijkstra()
    if reference is not None:
        solvers["C heap Dijkstra (gcc -O3)"] = (costs, reference)
    times = rounds({name: (lambda f=f, c=c: f(c)) for name, (c, f) in solvers.items()}, budget)
    base = times.get("C heap Dijkstra (gcc -O3)", times["ours, numba"])
    exact, path = shortest_path(costs)
    rows: list[Row] = []
    for name, (c, f) in solvers.items():
        d, p = f(c)
        same = (p.to(path.dtype) == path[: len(c)]).flatten(1).all(1).double().mean().item()
        per_map = [t / len(c) for t in times[name]]
        ratio = statistics.median(t / (b / batch) for t, b in zip(per_map, base, strict=True))
        error = ((d - exact[: len(c)]).abs() / exact[: len(c)]).max().item()
        rows.append(
            {
                "maps": f"{kind} {size}x{size}",
                "solver": name,
                "us a map": 1e6 * statistics.median(per_map),
                "least": 1e6 * min(per_map),
                "times C": ratio,
                "largest relative error of the distance": error,
                "% same path": 100 * same,
            }
        )
    return rows


def compare_batches(budget: float) -> list[Row]:
    """How the time of one call grows with the batch; what threads give."""
    rows: list[Row] = []
    for batch, side in ((1, 12), (10, 12), (100, 12), (1000, 12), (200, 96)):
        costs = torch.rand(batch, side, side, generator=torch.Generator().manual_seed(0)) + 0.1
        functions: dict[str, Callable[[], object]] = {
            "numba": lambda c=costs: shortest_path(c, backend="numba"),
            "torch": lambda c=costs: shortest_path(c, backend="torch"),
        }
        times = rounds(functions, budget)
        row: Row = {"batch": batch, "map": f"{side}x{side}"} | {
            f"{k}, us a map": 1e6 * statistics.median(t) / batch for k, t in times.items()
        }
        if batch >= 200:
            torch.set_num_threads(2)
            two = rounds({"numba": functions["numba"]}, budget)["numba"]
            torch.set_num_threads(1)
            row["numba, two threads"] = 1e6 * statistics.median(two) / batch
        rows.append(row)
    return rows


def check_cost() -> Row:
    """What refusing bad costs takes, in the solver's own loop: measured as a separate pass, an upper bound."""
    costs = torch.rand(1000, 12, 12, dtype=torch.float64)
    functions: dict[str, Callable[[], object]] = {
        "check": lambda: bool(((costs >= 0) & (costs < torch.inf)).all()),
        "solve": lambda: shortest_path(costs),
    }
    times = rounds(functions, 1.0)
    return {name: 1e6 * statistics.median(t) / 1000 for name, t in times.items()}


def compare_losses(batch: int, samples: int, budget: float) -> list[Row]:
    """Milliseconds for forward and backward of each loss on ``batch`` maps of 12 x 12, against what one would pick."""
    costs = torch.rand(batch, 12, 12, generator=torch.Generator().manual_seed(0)) + 0.2
    target = shortest_path(costs.flip(0)).path
    steepness, iterations = 5.0, 24

    def solve(c: Tensor) -> Tensor:
        return shortest_path(c.clamp(min=0)).path

    def scipy_solve(c: Tensor) -> Tensor:
        return csgraph(c.clamp(min=1e-9))[1].to(c.dtype)

    def on_path(path: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda c: torch.nn.functional.mse_loss(path(c), target)

    def relaxed(loop: str) -> Callable[[Tensor], Tensor]:
        return lambda c: relaxed_bellman_ford(c, loop=loop, steepness=steepness)

    noise = {"samples": samples, "sigma": 0.5}
    families: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
        f"relaxed Bellman-Ford, {loop}": {
            "AlgoVision": on_path(published_bellman_ford(steepness, iterations, loop)),
            "ours": on_path(relaxed(loop)),
        }
        for loop in ("for", "while")
    }
    fy = {f: FenchelYoungLoss(f, minimize=True, **noise) for f in (solve, scipy_solve)}
    families["Fenchel-Young"] = {
        "scipy csgraph, a loop": lambda c: fy[scipy_solve](c, target),
        "ours": lambda c: fy[solve](c, target),
    }
    pyepo = pyepo_loss(samples, 0.5)
    if pyepo is not None:
        peer = {"PyEPO over scipy csgraph": lambda c: pyepo(c.flatten(1), target.flatten(1))}
        families["Fenchel-Young"] = peer | families["Fenchel-Young"]
    smooth = {
        (name, f): StochasticSmoothing(f, estimator=name, **noise)
        for name in ("score", "finite_difference")
        for f in (solve, scipy_solve)
    }
    for estimator in ("score", "finite_difference"):
        families[f"smoothing, {estimator}"] = {
            "scipy csgraph, a loop": on_path(smooth[estimator, scipy_solve]),
            "ours": on_path(smooth[estimator, solve]),
        }
    rows: list[Row] = []
    for family, methods in families.items():
        functions = {name: (lambda f=f: backward(f, costs)) for name, f in methods.items()}
        times = rounds(functions, budget)
        first = next(iter(times))
        for name in methods:
            ratio = statistics.median(a / b for a, b in zip(times[first], times[name], strict=True))
            row: Row = {"loss": family, "method": name, "ms": 1e3 * statistics.median(times[name])}
            row |= {"least": 1e3 * min(times[name]), "speedup": ratio}
            if family.startswith("relaxed"):
                row["largest difference of the gradient"] = (
                    (backward(methods[name], costs) - backward(methods[first], costs)).abs().max().item()
                )
                row["kept MiB"] = kept_bytes(methods[name], costs) / 2**20
            rows.append(row)
    return rows


def backward(loss: Callable[[Tensor], Tensor], costs: Tensor) -> Tensor:
    x = costs.clone().requires_grad_()
    loss(x).backward()
    assert x.grad is not None
    return x.grad


def kept_bytes(loss: Callable[[Tensor], Tensor], costs: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps."""
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = loss(costs.clone().requires_grad_())
    del y
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shortest_path",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, short rounds: a look")
    parser.add_argument("--train", type=int, metavar="SEEDS", help="instead, train the example with every loss")
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.train:
        from benchmarks.shortest_path.training import compare_training

        compare_training(options.train, options.steps, options.out)
        return
    began = time.perf_counter()
    shortest_path(torch.ones(2, 2))
    first_call = time.perf_counter() - began
    budget = 0.3 if options.quick else 6.0
    sizes = [(12, 100), (24, 50)] if options.quick else [(12, 1000), (24, 300), (96, 20)]
    exact = [row for s, b in sizes for k in ("uniform", "terrains") for row in compare_exact(k, s, b, budget)]
    batches = compare_batches(budget / 3)
    losses_batch, samples = 10 if options.quick else 100, 10
    losses = compare_losses(losses_batch, samples, budget)
    report = {
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "load of the machine during the last minute": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "seconds of the first call (numba's code from its cache, if it was there)": round(first_call, 2),
        "checking the costs as a pass of its own, and solving, us a map": check_cost(),
        "exact": exact,
        "batches": batches,
        "losses": losses,
    }
    (options.out / "shortest_path.json").write_text(json.dumps(report, indent=1) + "\n")
    text = "\n\n".join(
        [
            "# Exact solvers",
            markdown(exact),
            "# One call of shortest_path, by batch",
            markdown(batches),
            f"# Losses, forward and backward, {losses_batch} maps of 12x12, {samples} samples of noise",
            markdown(losses),
            "\n".join(f"* {k}: {v}" for k, v in report.items() if not isinstance(v, list)),
        ]
    )
    (options.out / "shortest_path.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
