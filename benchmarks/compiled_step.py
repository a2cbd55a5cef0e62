"""What ``compile_step=True`` brings: kernels in place of operations, and the time of a training step.

    python -m benchmarks.compiled_step      # about five minutes; writes benchmarks/results/compiled_step.{md,json}

**Kernels.** For outputs (128, m) the operations that the step launches beside a plain backward pass (a dispatch mode
counts them; views and allocations are not counted), and the kernels of the code that torch.compile makes of them. That
code is for the CPU here; a GPU's has not been made.

**Time.** Training steps of two networks on a CPU, one thread: plain, with each rule, with each rule compiled,
alternating in one process; medians, and medians of the ratios within a round. Compilation is not in them: it is the
column "first step".
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch._inductor.metrics
import torch.nn.functional as F
from benchmarks.tables import markdown
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import newton_plugin as npl

RESULTS = Path(__file__).parent / "results"
WIDTHS = (1, 10, 1000, 50_000)
RULES: dict[str, dict[str, Any]] = {
    "default": {},
    "norm": {"curvature": "norm"},
    "fixed": {"damping": 0.1, "structure": "isotropic"},
    "gated": {"structure": "gated"},
}
VIEWS = {
    *("alias", "as_strided", "detach", "diagonal", "expand", "permute", "select", "slice", "squeeze", "t", "transpose"),
    *("unflatten", "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "empty", "empty_like", "new_empty"),
}


class Launches(TorchDispatchMode):
    """Counts the operations that would launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ not in VIEWS
        return func(*args, **(kwargs or {}))


@functools.cache
def weight(m: int) -> Tensor:
    return torch.randn(16, m, requires_grad=True)


def outputs(m: int) -> Tensor:
    """(128, m), always by the same linear layer, which a rule may look at."""
    return torch.randn(128, 16) @ weight(m)


def loss_of(y: Tensor, t: Tensor) -> Tensor:
    return (y - t).square().sum(-1).mean()


def operations(hook: Callable[[Tensor], Tensor], m: int) -> int:
    """Operations of a step beyond the plain one."""
    counts = []
    for use in (hook, lambda loss: loss):
        for _ in range(7):  # at others the hook looks for shared operations
            y, t = outputs(m), torch.randn(128, m)
            with Launches() as launches:
                use(loss_of(y, t)).backward()
        counts.append(launches.count)
    return counts[0] - counts[1]


def kernels(options: dict[str, Any], m: int) -> tuple[int, int, float]:
    """Operations of the eager step, kernels of the compiled one, seconds of its first step."""
    eager = operations(npl.LossHook(**options), m)
    torch._dynamo.reset()
    torch._inductor.metrics.reset()
    hook = npl.LossHook(**options, compile_step=True)
    y, t = outputs(m), torch.randn(128, m)
    start = time.perf_counter()
    hook(loss_of(y, t)).backward()
    return eager, torch._inductor.metrics.generated_kernel_count, time.perf_counter() - start


def mlp(width: int, m: int) -> nn.Module:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, m))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"2 ms": lambda: mlp(384, 10), "30 ms": lambda: mlp(1700, 10)}


def steps(make: Callable[[], nn.Module], rounds: int) -> dict[str, float]:
    """Median milliseconds of the plain step, and medians of the ratios to it."""
    torch.manual_seed(0)
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    x, t = torch.randn(128, 64), torch.randint(0, 10, (128,))
    arms: dict[str, Callable[[Tensor], Tensor]] = {"plain": lambda loss: loss}
    for name, options in RULES.items():
        arms[name] = npl.LossHook(**options)
        arms[f"{name}, compiled"] = npl.LossHook(**options, compile_step=True)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for k in range(rounds + 20):
        for name, hook in arms.items():
            start = time.perf_counter()
            optimizer.zero_grad()
            hook(F.cross_entropy(net(x), t)).backward()
            optimizer.step()
            if k >= 20:
                times[name].append(time.perf_counter() - start)
    plain = times["plain"]
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, plain, strict=True)) for name, values in times.items()
    }
    return {"plain_ms": 1e3 * statistics.median(plain), **{k: v for k, v in ratios.items() if k != "plain"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch._inductor.config.force_disable_caches = True  # the first step shall compile
    counted = [
        {"rule": name, "m": m, **dict(zip(("operations", "kernels", "seconds"), kernels(options, m), strict=True))}
        for name, options in RULES.items()
        for m in WIDTHS
    ]
    timed = [
        {"network": name, **steps(make, rounds if name == "2 ms" else rounds // 4)} for name, make in NETWORKS.items()
    ]
    (RESULTS / "compiled_step.json").write_text(json.dumps({"kernels": counted, "steps": timed}, indent=1))
    (RESULTS / "compiled_step.md").write_text(report(counted, timed))
    print(report(counted, timed))


def report(counted: list[dict[str, Any]], timed: list[dict[str, Any]]) -> str:
    kernel_rows = [{**row, "seconds": round(row["seconds"])} for row in counted]
    names = {"operations": "operations, eager", "kernels": "kernels, compiled", "seconds": "seconds of the first step"}
    kernel_rows = [{names.get(k, k): v for k, v in row.items()} for row in kernel_rows]
    time_rows = [
        {
            "network": row["network"],
            "plain, ms": round(row["plain_ms"], 1),
            "rule": name,
            "eager": f"{row[name]:.3f}",
            "compiled": f"{row[f'{name}, compiled']:.3f}",
        }
        for row in timed
        for name in RULES
    ]
    return "\n".join(
        [
            "# What `compile_step=True` brings",
            "",
            f"torch {torch.__version__}, CPU, one thread; `python -m benchmarks.compiled_step`.",
            "",
            "## Kernels",
            "",
            "Outputs (128, m). Operations: what the eager step launches beside a plain backward pass. Kernels: of the",
            "code that torch.compile makes, for the CPU. The first step compiles.",
            "",
            markdown(kernel_rows),
            "",
            "## Time of a training step, as a ratio to the plain one",
            "",
            markdown(time_rows),
            "",
        ]
    )


if __name__ == "__main__":
    main()
