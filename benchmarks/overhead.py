"""What a step costs with the plugin: whole training steps, plain and hooked, interleaved in one process.

    python -m benchmarks.overhead                 # every task, about fifteen minutes
    python -m benchmarks.overhead --only "sorting images" --seconds 10
    python -m benchmarks.overhead --table         # no measuring: Markdown from the rows that there are

For every task and every curvature: the median ratio to the plain step taken right before (one round each, so that a
busy machine slows both), its quartiles, and what the step costs more in units of one gradient (loss forward and
backward to the outputs, without the network). Setup (the first three rounds) is left out. The peer is the plain step:
no published package computes Newton Losses; :mod:`benchmarks.large_outputs` has those that compute parts of it.

Where CUDA is available, times are those of CUDA events, and the results are overhead_cuda.json and overhead_cuda.md.
Whether the host waits for the device is tested, not measured: tests/cuda/test_waiting.py.
Results: benchmarks/results/overhead.json and overhead.md.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from benchmarks.tables import markdown
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin.algorithms import RankingLoss, relaxed_bellman_ford

WARM_UP, LEAST, FEWEST = 3, 15, 5
IMAGES = (5, 10, 32)  # lists of so many images, as in the paper; at 100 one step of the CNN takes seconds
RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

FISHER = {
    "default": {},
    "fisher, auto damping": {"structure": "mean"},
    "fisher, damping 0.1": {"damping": 0.1},
    "norm": {"curvature": "norm"},
    "gated": {"structure": "gated"},
}
HESSIAN = {"hessian, damping 0.1": {"curvature": "hessian", "damping": 0.1}}
KEPT = {"hessian, refresh_every 10": {"curvature": npl.Hessian(refresh_every=10), "damping": 0.1}}
SAMPLES = {"hessian per sample": {"curvature": "hessian", "structure": "per_sample", "damping": 0.1}}
DIAGONAL = {"hessian diagonal": {"curvature": "hessian", "structure": "diagonal", "damping": 0.1}}


class Task(NamedTuple):
    make: Callable[[], nn.Module]
    inputs: Tensor
    loss: Callable[[Tensor], Tensor]
    arms: dict[str, dict[str, Any]]


def cnn(classes: int) -> nn.Module:
    """28x28 images, two convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, classes)),
    )


def scorer() -> nn.Module:
    """The demo's network: one score for each of n items."""
    layers = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(-2))
    return nn.Sequential(*layers)


class ImageScorer(nn.Module):
    """The paper's network for ranking: one score for each of n images, by the same convolutions as :func:`cnn`."""

    def __init__(self) -> None:
        super().__init__()
        self.network = cnn(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.flatten(0, 1)).reshape(images.shape[:2])


def cost_maps(size: int) -> nn.Module:
    """Images of 8 pixels a cell to a map of size x size positive costs."""
    layers = (nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Conv2d(32, 1, 1), nn.Softplus(), nn.Flatten(1, 2))


def segmenter() -> nn.Module:
    """64 x 64 images to 21 classes a pixel."""
    layers = (nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())
    return nn.Sequential(*layers, nn.Conv2d(32, 21, 1))


def tasks() -> dict[str, Task]:
    g = torch.Generator().manual_seed(0)
    found: dict[str, Task] = {}
    images = torch.rand(128, 1, 28, 28, generator=g).to(DEVICE)
    for m in (10, 100, 1000, 50_000):
        labels = torch.randint(m, (128,), generator=g).to(DEVICE)
        arms = {**FISHER, **HESSIAN, **KEPT, **SAMPLES, **DIAGONAL}
        found[f"CNN 28x28, N = 128, cross-entropy, m = {m}"] = Task(
            lambda m=m: cnn(m), images, lambda y, t=labels: F.cross_entropy(y, t), arms
        )
    losses = {
        "NeuralSort": RankingLoss("neural_sort", temperature=0.1),
        "SoftSort": RankingLoss("soft_sort", temperature=0.1),
        "odd-even network": RankingLoss("sorting_network", layout="odd_even", steepness=10.0),
    }
    for name, ranking in losses.items():
        for n in (5, 10, 32, 100):
            ranks = torch.rand(32, n, generator=g).argsort(-1).to(DEVICE)
            found[f"sorting, {name}, n = m = {n}, N = 32, MLP 64-64-32-1"] = Task(
                scorer,
                torch.rand(32, n, 64, generator=g).to(DEVICE),
                lambda y, t=ranks, loss=ranking: loss(y, t),
                {"fisher, damping 0.1": {"damping": 0.1}, **HESSIAN, **KEPT},
            )
            if n in IMAGES:
                found[f"sorting images, {name}, n = m = {n}, N = 32, CNN 28x28"] = Task(
                    ImageScorer,
                    torch.rand(32, n, 1, 28, 28, generator=g).to(DEVICE),
                    lambda y, t=ranks, loss=ranking: loss(y, t),
                    {**FISHER, **HESSIAN, **KEPT},
                )
    for size in (12, 48):
        path = (torch.rand(16, size, size, generator=g) < 2 / size).float().to(DEVICE)
        grids = {"fisher, damping 0.1": {"damping": 0.1}, **SAMPLES, **HESSIAN, **KEPT}
        found[f"cost grids {size} x {size}, relaxed Bellman-Ford, N = 16"] = Task(
            lambda size=size: cost_maps(size),
            torch.rand(16, 3, 8 * size, 8 * size, generator=g).to(DEVICE),
            lambda y, t=path: F.mse_loss(relaxed_bellman_ford(y), t),
            grids,
        )
    pixels = torch.randint(21, (4, 64, 64), generator=g).to(DEVICE)
    dense = {**FISHER, **HESSIAN, **SAMPLES, "hessian block": {**HESSIAN["hessian, damping 0.1"], "structure": "block"}}
    found["segmentation 21 x 64 x 64, N = 4, feature_dims = 1 (m = 21)"] = Task(
        segmenter,
        torch.rand(4, 3, 64, 64, generator=g).to(DEVICE),
        lambda y: F.cross_entropy(y, pixels),
        {name: {**options, "feature_dims": 1} for name, options in dense.items()},
    )
    found["segmentation 21 x 64 x 64, N = 4, all features (m = 86,016)"] = Task(
        segmenter,
        torch.rand(4, 3, 64, 64, generator=g).to(DEVICE),
        lambda y: F.cross_entropy(y, pixels),
        {"fisher, damping 0.1": {"damping": 0.1}, **DIAGONAL},
    )
    return found


def seconds_of(step: Callable[[], None]) -> float:
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    step()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1e3


def training_step(task: Task, options: dict[str, Any] | None) -> Callable[[], None]:
    torch.manual_seed(0)
    model = task.make().to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    hook = (lambda loss: loss) if options is None else npl.LossHook(**options)

    def step() -> None:
        optimizer.zero_grad()
        hook(task.loss(model(task.inputs))).backward()
        optimizer.step()

    return step


def one_gradient(task: Task) -> Callable[[], None]:
    """The loss and its gradient at fixed outputs."""
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = task.make().to(DEVICE)(task.inputs)
    y = outputs.requires_grad_()
    return lambda: torch.autograd.grad(task.loss(y), y)[0].sum()


def measure(task: Task, budget: float) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds of every round of every arm that can be had, and what failed."""
    arms = {"plain": training_step(task, None), "one gradient": one_gradient(task)}
    failed = []
    for name, options in task.arms.items():
        step = training_step(task, options)
        try:
            if seconds_of(step) > budget:
                raise npl.NewtonPluginError(f"one step takes more than {budget:.0f} s")
        except npl.NewtonPluginError as error:
            failed.append(f"{name}: {error}")
            continue
        arms[name] = step
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    start = time.perf_counter()

    def enough() -> bool:
        rounds, spent = len(seconds["plain"]) - WARM_UP, time.perf_counter() - start
        return rounds >= FEWEST and spent >= budget and (rounds >= LEAST or spent >= 4 * budget)

    while not enough():
        for name, step in arms.items():
            seconds[name].append(seconds_of(step))
    return {name: values[WARM_UP:] for name, values in seconds.items()}, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="tasks whose title contains this")
    parser.add_argument(
        "--seconds", type=float, default=15.0, help="for each task; up to four times as long for 15 rounds, at least 5"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    if arguments.table:
        for path in sorted(RESULTS.glob("overhead*.json")):
            write_table(path)
        return
    path = RESULTS / f"overhead{'_cuda' if DEVICE.type == 'cuda' else ''}.json"
    report: dict[str, Any] = json.loads(path.read_text()) if arguments.only and path.exists() else {"rows": []}
    report |= {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    report["device"] = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    for title, task in tasks().items():
        if arguments.only not in title:
            continue
        seconds, notes = measure(task, arguments.seconds)
        plain, gradient = seconds.pop("plain"), statistics.median(seconds.pop("one gradient"))
        rows = []
        for name, values in seconds.items():
            low, middle, high = statistics.quantiles([a / b for a, b in zip(values, plain, strict=True)], n=4)
            more = statistics.median([a - b for a, b in zip(values, plain, strict=True)])
            rows.append(
                {
                    "task": title,
                    "curvature": name,
                    "plain ms": round(1e3 * statistics.median(plain), 2),
                    "ratio": round(middle, 3),
                    "quartiles": f"{low:.3f} to {high:.3f}",
                    "more, in gradients": round(more / gradient, 2),
                    "rounds": len(values),
                }
            )
        print(markdown(rows), *notes, sep="\n", flush=True)
        report["rows"] = [r for r in report.get("rows", []) if r["task"] != title] + rows
        report.setdefault("notes", {})[title] = notes
        path.write_text(json.dumps(report, indent=1) + "\n")
    write_table(path)


def write_table(path: Path) -> None:
    """The Markdown beside a file of rows."""
    report = json.loads(path.read_text())
    notes = [f"* {title}: {note}" for title, found in report.get("notes", {}).items() for note in found]
    order = {title: k for k, title in enumerate(tasks())}
    rows = sorted(report["rows"], key=lambda row: order.get(row["task"], len(order)))
    made = f"torch {report['torch']}, {report['device']}, {report['threads']} thread(s)"
    path.with_suffix(".md").write_text(f"{markdown(rows)}\n\n{made}.\n\n" + "\n".join(notes) + "\n")


if __name__ == "__main__":
    main()
