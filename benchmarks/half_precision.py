"""What a step costs in half precision: time and memory, beside the plain step of the same format.

    python -m benchmarks.half_precision                  # about ten minutes; writes the column "this version"
    python -m benchmarks.half_precision --column NAME    # another version that is installed, as a column of its own

The head of a language model: 2 x 256 tokens, Linear(768, 50257), cross-entropy, one thread. Time is CPU time of forward
and backward, the median ratio to the plain step taken right before. Memory is the peak of tensors alive that two steps
made (in the published rows: one step), so what the rule keeps from one step to the next counts. Steps at which a hook
looks for other users of the loss (1, 2, 4, ..., every 256th, and the one after) are left out.

PyTorch has no fast float16 product of matrices on CPUs. There the outputs themselves are the parameters, a plain step
is the loss alone, and the ratios are larger than those of a network.
Results: benchmarks/results/half_precision.json and half_precision.md.
"""

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from benchmarks.large_outputs import Alive
from benchmarks.tables import markdown
from torch import Tensor, nn

import newton_plugin as npl

BATCH, TOKENS, WIDTH, WORDS = 2, 256, 768, 50_257
UNLOOKED, ROUNDS = 9, 4  # steps before the first that is measured: the next look is at the 16th
RESULTS = Path(__file__).parent / "results"
DOORS: dict[str, Callable[[Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "plain": lambda loss: loss,
    "LossHook": lambda loss: hooked(loss, npl.LossHook()),
    "newton_loss": lambda loss: npl.newton_loss(loss),
    "LossHook, norm": lambda loss: hooked(loss, npl.LossHook(curvature="norm")),
}


class Format(NamedTuple):
    """How a step computes: dtypes of network and autocast, the scale of the loss, whether there is a head."""

    network: torch.dtype
    autocast: torch.dtype | None = None
    scale: float = 1.0
    head: bool = True


FORMATS = {
    "float32": Format(torch.float32),
    "bfloat16": Format(torch.bfloat16),
    "autocast, bfloat16": Format(torch.float32, torch.bfloat16),
    "float32, no network": Format(torch.float32, head=False),
    "float16, no network": Format(torch.float16, scale=1024.0, head=False),
    "float16 outputs, loss in float32 times 65536, no network": Format(torch.float32, torch.float16, 65536.0, False),
}


class Head(nn.Module):
    """Words from features, or a parameter for each score."""

    def __init__(self, format: Format) -> None:
        super().__init__()
        self.format = format
        self.last = nn.Linear(WIDTH, WORDS) if format.head else None
        self.scores = nn.Parameter(torch.randn(BATCH, TOKENS, WORDS)) if not format.head else None
        self.to(format.network)

    def forward(self, x: Tensor) -> Tensor:
        if self.last is not None:
            return self.last(x)
        scores = self.scores[:, : x.shape[1]]  # type: ignore[index]
        return scores * 1 if self.format.autocast is None else scores.to(self.format.autocast)


def cross_entropy(y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y.flatten(0, 1), t.flatten())


def hooked(loss: Callable[[Tensor, Tensor], Tensor], hook: npl.LossHook) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda y, t: hook(loss(y, t))


def training_step(format: Format, door: str) -> Callable[..., None]:
    torch.manual_seed(0)
    net, loss = Head(format), DOORS[door](cross_entropy)
    x, t = torch.randn(BATCH, TOKENS, WIDTH).to(format.network), torch.randint(WORDS, (BATCH, TOKENS))

    def step(tokens: int = TOKENS) -> None:
        net.zero_grad()
        context = torch.autocast("cpu", format.autocast) if format.autocast else contextlib.nullcontext()
        with context:
            value = loss(net(x[:, :tokens]), t[:, :tokens])
        (value * format.scale).backward()

    return step


def seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(name: str, format: Format) -> list[dict[str, Any]]:
    steps = {door: training_step(format, door) for door in DOORS}
    for step in steps.values():
        for _ in range(UNLOOKED):
            step()
    taken = [{door: seconds(step) for door, step in steps.items()} for _ in range(ROUNDS)]
    rows = []
    for door, step in steps.items():
        gc.collect()
        with Alive() as alive:
            step()
            step()
        ms = 1e3 * statistics.median(t[door] for t in taken)
        ratio = statistics.median(t[door] / t["plain"] for t in taken)
        rows.append({"format": name, "step": door, "ms": round(ms), "time": round(ratio, 2), "MB": alive.peak // 10**6})
        rows[-1]["memory"] = round(rows[-1]["MB"] / rows[0]["MB"], 2)
        print(rows[-1], flush=True)
    return rows


def table(columns: dict[str, list[dict[str, Any]]]) -> str:
    """One line for each format and step, times and memory of all versions side by side."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for column, rows in columns.items():
        for row in rows:
            line = lines.setdefault((row["format"], row["step"]), {"computes in": row["format"], "step": row["step"]})
            line[f"time, {column}"] = f"{row['time']:.2f} ({row['ms']} ms)"
            line[f"memory, {column}"] = f"{row['memory']:.2f} ({row['MB']} MB)"
    return markdown(list(lines.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--column", default="this version")
    parser.add_argument("--only", default="", help="formats whose name contains this; the others stay as they are")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, format in FORMATS.items():
        if arguments.only in name:
            write(arguments.column, name, measure(name, format))


def write(column: str, name: str, rows: list[dict[str, Any]]) -> None:
    """Put the rows of one format in the place of those that a column had, and write the tables."""
    path = RESULTS / "half_precision.json"
    report = json.loads(path.read_text()) if path.exists() else {"columns": {}}
    others = [row for row in report["columns"].get(column, []) if row["format"] != name]
    report["columns"][column] = sorted([*others, *rows], key=lambda row: list(FORMATS).index(row["format"]))
    report["torch"] = str(torch.__version__)
    path.write_text(json.dumps(report, indent=1) + "\n")
    about = "Ratios to the plain step of the same format; in brackets CPU time and peak of tensors alive."
    made = f"torch {report['torch']}, 1 thread."
    path.with_suffix(".md").write_text(f"{table(report['columns'])}\n\n{about} {made}\n")


if __name__ == "__main__":
    main()
