"""Differentiable sorting side by side: time, memory and accuracy of ours, diffsort and the textbook formulas.

    python -m benchmarks.sorting [--quick]             # time, memory, accuracy
    python -m benchmarks.sorting --train 5             # does it learn: digits, validation images
    python -m benchmarks.sorting --pictures docs/img   # P of each method for one list

One process, one thread, forward + backward of P in float32, methods interleaved round by round; a figure is
the median of the rounds and its ratio the median of the per-round ratios. Accuracy is the largest error of
the float32 P against a float64 reference (the paper's formulas in float64; diffsort in float64), on the
scores timed and on the same scores times 1000. Memory is what autograd keeps between forward and backward,
counted by saved-tensor hooks. Writes results/sorting.json and results/sorting.md.
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
from diffsort import DiffSortNet
from torch import Tensor

from newton_plugin.algorithms import RankingLoss, SortingNetwork, neural_sort, soft_rank, soft_sort

TAU, STEEPNESS = 0.1, 10.0
RESULTS = Path(__file__).parent / "results"
Function = Callable[[Tensor], Tensor]


def paper_neural_sort(s: Tensor) -> Tensor:
    """As published, ascending: the row sums of |s_i - s_j| are a product with a matrix of ones."""
    n = s.shape[-1]
    distance = (s.unsqueeze(-1) - s.unsqueeze(-2)).abs()
    spread = distance @ torch.ones(n, n, dtype=s.dtype)
    scaling = 2 * torch.arange(1, n + 1, dtype=s.dtype) - n - 1
    z = s.unsqueeze(-1) * scaling - spread
    return torch.softmax(z.transpose(-1, -2) / TAU, -1)


def lean_neural_sort(s: Tensor) -> Tensor:
    """The same formula with a sum in place of that product: the least a textbook version needs."""
    spread = (s.unsqueeze(-1) - s.unsqueeze(-2)).abs().sum(-1)
    scaling = torch.arange(1 - s.shape[-1], s.shape[-1], 2, dtype=s.dtype).unsqueeze(-1)
    return torch.softmax((scaling * s.unsqueeze(-2) - spread.unsqueeze(-2)) / TAU, -1)


def paper_soft_sort(s: Tensor) -> Tensor:
    """As published, ascending."""
    distance = (s.sort(-1).values.unsqueeze(-1) - s.unsqueeze(-2)).abs()
    return torch.softmax(-distance / TAU, -1)


def methods(n: int) -> dict[str, dict[str, Function]]:
    """family -> name -> function; the first of a family is what the ratios compare with."""
    table: dict[str, dict[str, Function]] = {
        "NeuralSort": {
            "textbook (paper)": paper_neural_sort,
            "textbook (lean)": lean_neural_sort,
            "ours": partial(neural_sort, temperature=TAU),
        },
        "SoftSort": {"textbook (paper)": paper_soft_sort, "ours": partial(soft_sort, temperature=TAU)},
    }
    for layout in ("odd_even", "bitonic"):
        ours = SortingNetwork(n, layout, "logistic", STEEPNESS)
        family: dict[str, Function] = {
            "ours": lambda s, net=ours: net(s)[1],
            "ours, ranks only": partial(soft_rank, method=ours),
        }
        if n < 1024:  # its layers are dense n x n/2 matrices: 8 GiB of them at n = 1024
            theirs = DiffSortNet(layout, n, steepness=STEEPNESS, distribution="logistic")
            family = {"diffsort": lambda s, net=theirs: net(s)[1], **family}
        table[f"network {layout}"] = family
    return table


def reference(family: str, s: Tensor) -> Tensor:
    """P in float64 by the obvious code."""
    s = s.double()
    if family == "NeuralSort":
        return lean_neural_sort(s)
    if family == "SoftSort":
        return paper_soft_sort(s)
    network = DiffSortNet(family.split()[1], s.shape[-1], steepness=STEEPNESS, distribution="logistic")
    return network(s)[1].transpose(-1, -2)


def seconds(f: Function, s: Tensor) -> float:
    """One forward and backward."""
    x = s.clone().requires_grad_()
    start = time.perf_counter()
    y = f(x)
    y.backward(torch.ones_like(y))
    return time.perf_counter() - start


def kept_bytes(f: Function, s: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f(s.clone().requires_grad_())
    del y
    return sum(kept.values())


def compare(family: str, functions: dict[str, Function], batch: int, n: int, budget: float) -> list[dict]:
    """Interleaved rounds of one family at one size, until ``budget`` seconds are spent."""
    s = torch.randn(batch, n, generator=torch.Generator().manual_seed(n))
    for f in functions.values():
        seconds(f, s[: min(batch, 10)])  # warm up
    rounds: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(rounds) < 3 or (time.perf_counter() - start < budget and len(rounds) < 200):
        rounds.append({name: seconds(f, s) for name, f in functions.items()})
    first = next(iter(functions))
    few = s[: max(1, min(batch, 2**20 // n**2))]
    rows = []
    for name, f in functions.items():
        row: dict = {"family": family, "method": name, "batch": batch, "n": n, "rounds": len(rounds)}
        row["ms"] = 1e3 * statistics.median(r[name] for r in rounds)
        row["speedup"] = statistics.median(r[first] / r[name] for r in rounds)
        row["kept_MiB"] = kept_bytes(f, s) / 2**20
        if "ranks" not in name and n < 1024:
            for key, scale in (("error", 1.0), ("error_x1000", 1000.0)):
                p = f(scale * few)
                p = p.transpose(-1, -2) if name == "diffsort" else p
                row[key] = (p.double() - reference(family, scale * few)).abs().max().item()
        rows.append(row)
    return rows


def compare_losses(n: int, batch: int, budget: float) -> list[dict]:
    """The ranking loss: log domain against BCE of the float32 P, with the true gradient beside."""
    s = 2 * torch.randn(batch, n, generator=torch.Generator().manual_seed(n))
    ranks = (-s).argsort(-1).argsort(-1)  # a wrong order
    rows = []
    textbook = RankingLoss(lean_neural_sort)
    table = {
        "NeuralSort": {
            "BCE of P": textbook,
            "RankingLoss": RankingLoss("neural_sort", temperature=TAU),
        },
        "network odd_even": {
            "BCE of P": RankingLoss(
                lambda x: DiffSortNet("odd_even", n, steepness=STEEPNESS, distribution="logistic")(x)[1].transpose(
                    -1, -2
                )
            ),
            "RankingLoss": RankingLoss("sorting_network", steepness=STEEPNESS),
        },
    }
    for family, losses in table.items():
        functions = {name: partial(_call, loss, ranks) for name, loss in losses.items()}
        rounds = []
        start = time.perf_counter()
        while len(rounds) < 3 or (time.perf_counter() - start < budget and len(rounds) < 200):
            rounds.append({name: seconds(f, s) for name, f in functions.items()})
        for name, f in functions.items():
            gradient = torch.func.grad(f)(s) * batch
            rows.append(
                {
                    "family": family,
                    "loss": name,
                    "batch": batch,
                    "n": n,
                    "ms": 1e3 * statistics.median(r[name] for r in rounds),
                    "speedup": statistics.median(r["BCE of P"] / r[name] for r in rounds),
                    "largest_gradient_entry": gradient.abs().max().item(),
                    "lists_with_a_zero_gradient": (gradient == 0).all(-1).double().mean().item(),
                }
            )
    return rows


def _call(loss: RankingLoss, ranks: Tensor, s: Tensor) -> Tensor:
    return loss(s, ranks)


GRID = {
    "neural_sort": [{"temperature": x} for x in (0.03, 0.1, 0.3, 1.0)],
    "soft_sort": [{"temperature": x} for x in (0.03, 0.1, 0.3, 1.0)],
    **{
        f"sorting_network {swap}": [{"swap": swap, "steepness": x} for x in (3.0, 10.0, 30.0, 100.0)]
        for swap in ("logistic", "cauchy")
    },
}


def train(method: str, options: dict, n: int, steps: int = 400, seeds: int = 4) -> list[float]:
    """Rank n images of different digits; the share of validation lists fully in order, per seed (all at once)."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.data, dtype=torch.float32)[order] / 16
    labels = torch.tensor(digits.target)[order]
    generator = torch.Generator().manual_seed(1)

    def lists(start: int, end: int, count: int) -> tuple[Tensor, Tensor]:
        chosen = torch.rand(count, 10, generator=generator).argsort(-1)[:, :n]  # n different digits
        picks = torch.rand(count, n, generator=generator)
        of_digit = [start + (labels[start:end] == d).nonzero().squeeze(-1) for d in range(10)]
        sizes = torch.tensor([len(o) for o in of_digit])
        padded = torch.nn.utils.rnn.pad_sequence(of_digit, batch_first=True)
        index = padded[chosen, (picks * sizes[chosen]).long()]
        return images[index], chosen.argsort(-1).argsort(-1)

    sizes = [(64, 64), (64, 32), (32, 1)]
    weights = [(torch.randn(seeds, a, b, generator=generator) * (2 / a) ** 0.5).requires_grad_() for a, b in sizes]
    biases = [torch.zeros(seeds, 1, b, requires_grad=True) for _, b in sizes]

    def score(x: Tensor) -> Tensor:
        x = x.flatten(-3, -2)
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            x = x @ w + b
            x = x.relu() if i < 2 else x
        return x.squeeze(-1).unflatten(-1, (-1, n))

    loss = RankingLoss(method.split()[0], **options)
    optimizer = torch.optim.Adam([*weights, *biases], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, ranks = lists(0, 1000, seeds * 32)
        optimizer.zero_grad()
        # The sum over seeds: each has its own weights, so each has the gradient of its own mean.
        scores = score(x.unflatten(0, (seeds, 32)))
        (seeds * loss(scores, ranks.unflatten(0, (seeds, 32)))).backward()
        optimizer.step()
        schedule.step()
    x, ranks = lists(1000, 1300, 2000)
    with torch.no_grad():
        right = score(x.expand(seeds, *x.shape)).argsort(-1).argsort(-1) == ranks
    return right.all(-1).double().mean(-1).tolist()


def compare_training(n: int) -> list[dict]:
    """Every method on a grid of four values of its sharpness."""
    rows = []
    for method, grid in GRID.items():
        for options in grid:
            start = time.perf_counter()
            shares = [100 * share for share in train(method, options, n)]
            sharpness = options.get("temperature", options.get("steepness"))
            row = {"method": method, "n": n, "sharpness": sharpness, "mean_%": statistics.mean(shares)}
            row |= {"sd": statistics.stdev(shares), "seconds": time.perf_counter() - start}
            rows.append(row)
            print(row, flush=True)
    return rows


def draw(folder: Path) -> None:
    """P of each method for one list of eight scores, two of them close."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    s = torch.tensor([0.9, -1.1, 0.15, 1.6, -0.4, 0.2, -1.8, 0.6])
    panels: dict[str, Tensor] = {
        "NeuralSort, temperature 1": neural_sort(s, 1.0),
        "NeuralSort, temperature 0.1": neural_sort(s, 0.1),
        "SoftSort, p = 1, temperature 0.3": soft_sort(s, 0.3),
        "SoftSort, p = 2, temperature 0.3": soft_sort(s, 0.3, p=2),
        "odd-even, logistic, steepness 10": SortingNetwork(8, steepness=10.0)(s)[1],
        "bitonic, logistic, steepness 10": SortingNetwork(8, "bitonic", steepness=10.0)(s)[1],
        "odd-even, Cauchy, steepness 10": SortingNetwork(8, swap="cauchy")(s)[1],
        "odd-even, optimal, steepness 10": SortingNetwork(8, swap="optimal")(s)[1],
    }
    figure, axes = plt.subplots(2, 4, figsize=(11, 5.8), layout="constrained")
    order = s.argsort()
    for axis, (title, p) in zip(axes.flat, panels.items(), strict=True):
        shown = axis.imshow(p[:, order], vmin=0, vmax=1, cmap="cividis")
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(8), [f"{v:.1f}" for v in s[order].tolist()], fontsize=7)
        axis.set_yticks([0, 7], ["smallest", "largest"], fontsize=8, rotation=90, va="center")
    figure.supxlabel("elements, in order of their scores", fontsize=10)
    figure.supylabel("ranks", fontsize=10)
    figure.colorbar(shown, ax=axes, shrink=0.7, label="P")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "sort_matrices.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes only, a few seconds")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--limit", type=float, default=6.0, help="GiB that one method may keep")
    parser.add_argument("--train", type=int, metavar="N", help="instead, learn to rank lists of N images")
    parser.add_argument("--pictures", type=Path, help="a folder: draw P of each method there, nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.pictures:
        draw(options.pictures)
        return
    if options.train:
        rows = compare_training(options.train)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "sorting_training.json").write_text(json.dumps(rows, indent=1) + "\n")
        (options.out / "sorting_training.md").write_text(markdown(rows) + "\n")
        return
    sizes = [(100, 5), (100, 10), (1000, 5), (1000, 10), (100, 32), (1000, 32), (100, 128), (1000, 128)]
    sizes = [(10, 5), (10, 10)] if options.quick else [*sizes, (100, 1024)]
    rows, skipped = [], []
    for batch, n in sizes:
        for family, functions in methods(n).items():
            chosen = dict(functions)
            for name, f in functions.items():
                # What it keeps grows in proportion to the batch: measured on one list.
                need = kept_bytes(f, torch.randn(1, n)) * batch / 2**30
                if need > options.limit:
                    skipped.append({"family": family, "method": name, "batch": batch, "n": n, "GiB": need})
                    del chosen[name]
            if chosen:
                rows += compare(family, chosen, batch, n, 0.3 if options.quick else 3.0)
                print(markdown(rows[-len(chosen) :]), flush=True)
    losses = [
        row
        for batch, n in ([(10, 5)] if options.quick else [(32, 10), (100, 32)])
        for row in compare_losses(n, batch, 0.3 if options.quick else 2.0)
    ]
    print(markdown(losses))
    machine = {"torch": torch.__version__, "threads": 1, "cpu": platform.processor() or platform.machine()}
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine, "sorting": rows, "losses": losses, "skipped": skipped}
    (options.out / "sorting.json").write_text(json.dumps(result, indent=1) + "\n")
    parts = [markdown(rows), markdown(losses), markdown(skipped) if skipped else "Nothing was skipped."]
    (options.out / "sorting.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
