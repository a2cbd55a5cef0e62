"""What a step costs with the plugin: whole training steps, plain and hooked, interleaved in one process.

    python -m benchmarks.overhead

Prints medians of the ratio to the plain step taken right before (one round each, so that a busy machine slows both),
with their quartiles, and writes benchmarks/results/overhead.json. The peer is the plain step: no published package
computes Newton Losses. Fixed damping and "auto" are both there; setup (the first five rounds) is left out and said.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin.algorithms import RankingLoss

ROUNDS, WARM_UP = 60, 5
RESULTS = Path(__file__).parent / "results" / "overhead.json"
HOOKS: dict[str, dict] = {
    "fisher, auto damping": {},
    "fisher, damping 0.1": {"damping": 0.1},
    "norm": {"curvature": "norm"},
    "hessian, damping 0.1": {"curvature": "hessian", "damping": 0.1},
}


def cnn(classes: int) -> nn.Module:
    """28x28 images, two convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, classes)),
    )


def scorer() -> nn.Module:
    """The demo's network."""
    layers = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(-2))
    return nn.Sequential(*layers)


Task = tuple[Callable[[], nn.Module], Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]


def tasks() -> dict[str, Task]:
    g = torch.Generator().manual_seed(0)
    images = torch.rand(128, 1, 28, 28, generator=g)
    ranking = RankingLoss("neural_sort", temperature=0.1)
    found: dict[str, Task] = {
        f"CNN 28x28, N = 128, cross-entropy, m = {m}": (
            lambda m=m: cnn(m),
            images,
            torch.randint(m, (128,), generator=g),
            F.cross_entropy,
        )
        for m in (10, 100)
    }
    ranks = torch.rand(32, 10, generator=g).argsort(-1)
    found["the demo: MLP 64-64-32-1, N = 32, NeuralSort, m = 10"] = (
        scorer,
        torch.rand(32, 10, 64, generator=g),
        ranks,
        ranking,
    )
    return found


def measure(task: Task) -> dict[str, list[float]]:
    """Seconds of every round of every arm."""
    make, x, t, loss_fn = task
    torch.manual_seed(0)
    arms: dict[str, Callable[[], None]] = {}
    for name, options in {"plain": None, **HOOKS}.items():
        model = make()
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        hook = (lambda loss: loss) if options is None else npl.LossHook(**options)

        def step(model: nn.Module = model, optimizer: torch.optim.Adam = optimizer, hook: Callable = hook) -> None:
            optimizer.zero_grad()
            hook(loss_fn(model(x), t)).backward()
            optimizer.step()

        arms[name] = step
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(ROUNDS + WARM_UP):
        for name, step in arms.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def main() -> None:
    report = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    report["tasks"] = {}
    for title, task in tasks().items():
        seconds = measure(task)
        plain = seconds["plain"]
        print(f"\n{title}: plain {1e3 * statistics.median(plain):.1f} ms")
        rows = {}
        for name in HOOKS:
            low, middle, high = statistics.quantiles([a / b for a, b in zip(seconds[name], plain, strict=True)], n=4)
            rows[name] = {"ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}
            print(f"  {name:24s} {middle:5.2f}x  [{low:.2f}, {high:.2f}]")
        report["tasks"][title] = {"plain_ms": round(1e3 * statistics.median(plain), 2), **rows}
    RESULTS.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
