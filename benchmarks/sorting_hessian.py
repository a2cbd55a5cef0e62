"""What the Hessian of the ranking loss costs: written down, by double backward, by torch.func; and in training steps.

    python -m benchmarks.sorting_hessian [--quick]       # 6 minutes; 1.5

One process, one thread, N = 32 lists, float32 scores, everything interleaved round by round; CPU time, medians, and
medians of the ratios of each round.

First table, on scores alone. ``loss + gradient`` is what plain training pays, and the unit of the ratios. ``Newton
step`` is ``newton_step(..., curvature="hessian")``: loss, gradient, all N Hessians, solve; with the Hessian that
``RankingLoss`` writes down, and by double backward (the same loss called with one more leading dimension, for
which it writes none). The peer is torch.func: ``vmap(hessian)``, the N Hessians alone. Error: of the step's mean
Hessian against ``vmap(hessian)`` in float64.

Second table, whole training steps: network, loss, backward, Adam; plain, and with
``LossHook(curvature="hessian", damping=0.1)`` in both ways.

Third table, plain training with N = 576 lists: loss and gradient, against the textbook's ``binary_cross_entropy`` on P.
Writes results/sorting_hessian.json and .md. A table "before and after" in the JSON was measured once, by these same
functions in two checkouts in turns, and is kept.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from benchmarks.tables import markdown
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin.algorithms import RankingLoss, SortingNetwork, neural_sort, soft_sort

RESULTS = Path(__file__).parent / "results"
LISTS = 32
METHODS: dict[str, dict] = {
    "neural_sort": {"temperature": 0.1},
    "soft_sort": {"temperature": 0.1},
    "sorting_network": {},
    "sorting_network, bitonic": {"layout": "bitonic"},
}


def interleaved(functions: dict[str, Callable[[], object]], budget: float) -> dict[str, list[float]]:
    """Seconds of each function, round by round; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    start = time.perf_counter()
    for turn in range(200):
        for name, f in functions.items():
            begin = time.process_time()
            f()
            if turn:
                seconds[name].append(time.process_time() - begin)
        if turn >= 3 and time.perf_counter() - start > budget:
            break
    return seconds


def hidden(loss: RankingLoss, scores: Tensor, ranks: Tensor) -> Tensor:
    """The same loss; of lists (1, N, n) it does not say its Hessian."""
    return loss(scores.unsqueeze(0), ranks.unsqueeze(0))


def summary(seconds: dict[str, list[float]], labels: dict[str, object], unit: str) -> list[dict]:
    return [
        {
            **labels,
            "what": name,
            "ms": 1e3 * statistics.median(values),
            "times": statistics.median(v / u for v, u in zip(values, seconds[unit], strict=True)),
            "rounds": len(values),
        }
        for name, values in seconds.items()
    ]


def compare(method: str, n: int, budget: float) -> list[dict]:
    """On scores alone."""
    generator = torch.Generator().manual_seed(n)
    scores, ranks = torch.randn(LISTS, n, generator=generator), torch.rand(LISTS, n, generator=generator).argsort(-1)
    loss = RankingLoss(method.split(",")[0], **METHODS[method])
    each = RankingLoss(loss.method, reduction="none")

    def gradient() -> Tensor:
        x = scores.clone().requires_grad_()
        return torch.autograd.grad(loss(x, ranks), x)[0]

    step = partial(npl.newton_step, curvature="hessian", damping=0.1)
    functions: dict[str, Callable[[], object]] = {
        "loss + gradient": gradient,
        "Newton step, written": lambda: step(lambda y: loss(y, ranks), scores),
    }
    if n <= 32:
        functions["Newton step, double backward"] = lambda: step(lambda y: hidden(loss, y, ranks), scores)
        functions["torch.func, Hessians alone"] = lambda: torch.func.vmap(torch.func.hessian(each))(scores, ranks)
    rows = summary(interleaved(functions, budget), {"method": method, "n": n}, "loss + gradient")
    if n <= 32:
        true = torch.func.vmap(torch.func.hessian(each))(scores.double(), ranks).mean(0)
        found = step(lambda y: loss(y, ranks), scores).curvature
        assert found is not None
        rows[1]["error"] = ((found - true).abs().max() / true.abs().max()).item()
    return rows


def textbook(method: str, n: int) -> Callable[[Tensor, Tensor], Tensor]:
    """BCE on P, in float32."""
    name, options = method.split(",")[0], METHODS[method]
    if name == "sorting_network":
        network = SortingNetwork(n, **options)
        p = lambda s: network(s)[1]  # noqa: E731
    else:
        p = partial({"neural_sort": neural_sort, "soft_sort": soft_sort}[name], **options)

    def loss(scores: Tensor, ranks: Tensor) -> Tensor:
        target = nn.functional.one_hot(ranks, n).mT.to(scores.dtype)
        return nn.functional.binary_cross_entropy(p(scores).clamp(0, 1), target)

    return loss


def compare_losses(method: str, n: int, budget: float, lists: int = 576) -> list[dict]:
    """Loss and gradient alone."""
    generator = torch.Generator().manual_seed(n)
    scores, ranks = torch.randn(lists, n, generator=generator), torch.rand(lists, n, generator=generator).argsort(-1)

    def gradient(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        x = scores.clone().requires_grad_()
        return torch.autograd.grad(loss(x, ranks), x)[0]

    ways = {
        "textbook": textbook(method, n),
        "RankingLoss": RankingLoss(method.split(",")[0], **METHODS[method]),
    }
    seconds = interleaved({name: partial(gradient, loss) for name, loss in ways.items()}, budget)
    return summary(seconds, {"method": method, "n": n, "lists": lists}, "textbook")


def scorer(images: bool) -> nn.Module:
    """(N, n, 64) -> (N, n): the demo's MLP; or (N, n, 1, 28, 28): two convolutions and two linear layers."""
    if not images:
        layers = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(-2))
        return nn.Sequential(*layers)
    return nn.Sequential(
        *(nn.Flatten(0, 1), nn.Conv2d(1, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 5), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 1)),
    )


def compare_steps(method: str, n: int, images: bool, budget: float) -> list[dict]:
    """Whole training steps."""
    generator = torch.Generator().manual_seed(n)
    x = torch.rand(LISTS, n, *((1, 28, 28) if images else (64,)), generator=generator)
    ranks = torch.rand(LISTS, n, generator=generator).argsort(-1)
    loss = RankingLoss(method.split(",")[0], **METHODS[method])
    ways: dict[str, tuple[Callable[..., Tensor], bool]] = {"plain": (loss, False), "Newton, written": (loss, True)}
    if n <= 32:
        ways["Newton, double backward"] = (partial(hidden, loss), True)

    def make(loss_fn: Callable[..., Tensor], newton: bool) -> Callable[[], None]:
        torch.manual_seed(0)
        model = scorer(images)
        optimizer = torch.optim.Adam(model.parameters(), 1e-3)
        hook = npl.LossHook(curvature="hessian", damping=0.1) if newton else lambda value: value

        def step() -> None:
            optimizer.zero_grad()
            hook(loss_fn(model(x).view(LISTS, n), ranks)).backward()
            optimizer.step()

        return step

    seconds = interleaved({name: make(*way) for name, way in ways.items()}, budget)
    return summary(seconds, {"method": method, "n": n, "scorer": "CNN 28x28" if images else "MLP 64-64-32-1"}, "plain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="n = 5 and 10 only")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lengths, budget = ((5, 10), 0.5) if options.quick else ((5, 10, 32, 100), 4.0)
    rows, steps, losses = [], [], []
    for method in METHODS:
        for n in lengths:
            if n <= 32:
                losses += compare_losses(method, n, budget)
            if n == 100 and method.startswith("sorting_network"):
                continue  # half a minute a step
            rows += compare(method, n, budget)
            for images in (False, True):
                if not (images and n > 10):
                    steps += compare_steps(method, n, images, budget)
            print(markdown(rows[-4:]), markdown(steps[-6:]), sep="\n\n", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "sorting_hessian.json"
    setup = {"torch": torch.__version__, "python": platform.python_version(), "threads": 1, "lists": LISTS}
    before = json.loads(path.read_text()).get("before and after", []) if path.exists() else []
    report = {**setup, "scores": rows, "steps": steps, "losses": losses, "before and after": before}
    path.write_text(json.dumps(report, indent=1) + "\n")
    tables = [markdown(table) for table in (rows, steps, losses, before) if table]
    path.with_suffix(".md").write_text("\n\n".join(tables) + "\n")


if __name__ == "__main__":
    main()
