"""Time and memory of one Newton step in output space against the number m of outputs.

    python -m benchmarks.large_outputs            # about four minutes
    python -m benchmarks.large_outputs --quick    # a look at m <= 1000; writes nothing

N = 100 maps of m cells; the loss couples neighbouring cells and is no standard loss, so its Hessians come from
products: ``l = sum_j log cosh(y_j - t_j) + 0.1 sum_j (y_j y_(j+1))^2 / (1 + y_j^2)``, indefinite. Cross-entropy over m
classes measures Hessians that are a diagonal plus rank one. Damping 0.1; everything in float64, so that errors mean
something.

Peers, in the same process:
* ``torch.func.hessian`` of each sample under vmap, and a dense repaired solve: the textbook;
* curvlinops' ``HessianLinearOperator`` over the outputs as parameters and its ``CGInverseLinearOperator``, to the same
  tolerance: the same per-sample systems where these are definite (its conjugate gradients do not repair others). Left
  out if it is not installed (``pip install curvlinops-for-pytorch``).

Memory is the peak of tensors alive that the step made, from a dispatch mode, in a run of its own. Error is against the
dense repaired step, where that fits. A second table, :func:`errors`, is about the per-sample step alone: its error
after 8 and 16 products on losses that are convex, a little and half indefinite, at m = 200.
Results: benchmarks/results/large_outputs.{json,md,png}.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from benchmarks.tables import markdown
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import newton_plugin as npl

N, DAMPING, TOLERANCE = 100, 0.1, 0.03  # the default of npl.Hessian
RESULTS = Path(__file__).parent / "results"
SIZES = (10, 30, 100, 300, 1000, 3000, 10_000, 30_000)
SIXTEEN = npl.Hessian("per_sample", products=16, tolerance=0.01)  # further than the defaults
MOST_SECONDS = 20.0  # an arm that took longer is not tried at larger sizes


def log_cosh(y: Tensor, t: Tensor) -> Tensor:
    return F.softplus(2 * (y - t)).sum(-1) - (y - t).sum(-1)


def sample_loss(y: Tensor, t: Tensor) -> Tensor:
    """One map's loss; (..., m) to (...)."""
    left, right = y[..., :-1], y[..., 1:]
    coupled = (left * right).square() / (1 + left.square())
    return log_cosh(y, t) + 0.1 * coupled.sum(-1)


def convex_loss(y: Tensor, t: Tensor) -> Tensor:
    return log_cosh(y, t) + 0.5 * y.diff(dim=-1).square().sum(-1)


def waves(y: Tensor, t: Tensor) -> Tensor:
    """Half of the Hessian's eigenvalues are negative."""
    return torch.sin(y - t).sum(-1) + 0.5 * torch.sin(y.diff(dim=-1)).sum(-1)


def newton(curvature: Any, y: Tensor, t: Tensor) -> Tensor:
    return npl.newton_step(lambda v: sample_loss(v, t).mean(), y, curvature=curvature, damping=DAMPING).step


def classes(curvature: Any, y: Tensor, t: Tensor) -> Tensor:
    labels = t.abs().mul(1000).long().sum(-1) % y.shape[1]
    return npl.newton_step(F.cross_entropy, y, labels, curvature=curvature, damping=DAMPING).step


def gradient(y: Tensor, t: Tensor, product: bool = False) -> Tensor:
    y = y.detach().requires_grad_()
    (g,) = torch.autograd.grad(sample_loss(y, t).sum(), y, create_graph=product)
    return torch.autograd.grad(g, y, g.detach())[0] if product else g


def dense(y: Tensor, t: Tensor) -> Tensor:
    """The textbook: every Hessian by torch.func, repaired by its eigenvalues."""
    g = gradient(y, t)
    if y.shape[1] > 300:
        raise MemoryError  # 100 eigendecompositions of 1000 x 1000 take minutes
    h = torch.func.vmap(torch.func.hessian(sample_loss))(y, t)
    values, vectors = torch.linalg.eigh(h)
    shifted = torch.where(values[:, :1] + DAMPING > 0, values, values.abs()) + DAMPING
    return (vectors @ ((vectors.mT @ g.unsqueeze(-1)).squeeze(-1) / shifted).unsqueeze(-1)).squeeze(-1)


def dense_fisher(y: Tensor, t: Tensor) -> Tensor:
    g = gradient(y, t)
    if y.shape[1] > 10_000:
        raise MemoryError
    c = g.mT @ g / N
    c.diagonal().add_(DAMPING)
    return torch.linalg.solve(c, g.mT).mT


class Outputs(nn.Module):
    """Outputs as parameters, for a library of Hessians with respect to parameters."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y = nn.Parameter(y.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.y


class SumLoss(nn.Module):
    reduction = "sum"

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        return sample_loss(y, t).sum()


def curvlinops_step(y: Tensor, t: Tensor) -> Tensor:
    from curvlinops import CGInverseLinearOperator, HessianLinearOperator  # type: ignore[import-not-found]
    from curvlinops.examples import IdentityLinearOperator  # type: ignore[import-not-found]

    model = Outputs(y)
    hessian = HessianLinearOperator(model, SumLoss(), list(model.parameters()), [(y, t)], check_deterministic=False)
    shifted = hessian + DAMPING * IdentityLinearOperator([tuple(y.shape)], y.device, y.dtype)
    inverse = CGInverseLinearOperator(shifted, tolerance=TOLERANCE, max_iter=32)
    return (inverse @ gradient(y, t).reshape(-1)).reshape(y.shape).detach()


def arms() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "one gradient": gradient,
        "one gradient, one product": lambda y, t: gradient(y, t, True),
        "Fisher, dense textbook": dense_fisher,
        "Fisher, ours": lambda y, t: newton("fisher", y, t),
        "Hessian per sample, torch.func.hessian": dense,
        "Hessian per sample, ours": lambda y, t: newton(npl.Hessian("per_sample"), y, t),
        "Hessian per sample, ours, 16 products": lambda y, t: newton(SIXTEEN, y, t),
        "Hessian mean, ours": lambda y, t: newton("hessian", y, t),
        "Hessian diagonal, ours": lambda y, t: newton(npl.Hessian("diagonal"), y, t),
        "cross-entropy mean, ours": lambda y, t: classes("hessian", y, t),
        "cross-entropy per sample, ours": lambda y, t: classes(npl.Hessian("per_sample"), y, t),
    }
    try:
        import curvlinops  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        return found
    return {**found, "Hessian per sample, curvlinops CG": curvlinops_step}


class Alive(TorchDispatchMode):
    """Peak bytes of tensors alive that were made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                self.alive[storage.cdata] = storage, tensor.untyped_storage().nbytes()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


class Timed(NamedTuple):
    """Medians over one to five runs after one that is left out, and what came of the last.

    ``gradients`` is the median ratio to one gradient taken right before: a busy machine slows both.
    """

    seconds: float
    gradients: float
    runs: int
    step: Tensor


def timed(arm: Callable[[Tensor, Tensor], Tensor], y: Tensor, t: Tensor) -> Timed:
    def seconds_of(run: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, Tensor]:
        start = time.perf_counter()
        result = run(y, t)
        return time.perf_counter() - start, result

    def run() -> Timed:
        (one, _), (mine, step) = seconds_of(gradient), seconds_of(arm)
        return Timed(mine, mine / one, 1, step)

    gradient(y, t)
    runs = [run()]
    while len(runs) < 6 and sum(r.seconds for r in runs) < MOST_SECONDS / 2:
        runs.append(run())
    kept = runs[1:] or runs
    seconds, gradients = statistics.median(r.seconds for r in kept), statistics.median(r.gradients for r in kept)
    return Timed(seconds, gradients, len(kept), runs[-1].step)


def measure(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    rows, tried = [], dict(arms())
    for m in sizes:
        g = torch.Generator().manual_seed(0)
        y, t = torch.randn(2, N, m, generator=g, dtype=torch.float64)
        steps: dict[str, Tensor] = {}
        for name, arm in list(tried.items()):
            try:
                taken = timed(arm, y, t)
                with Alive() as alive:
                    arm(y, t)
            except (MemoryError, npl.OutputsTooLargeError):
                del tried[name]
                continue
            if taken.seconds > MOST_SECONDS:
                del tried[name]
            steps[name] = taken.step
            rows.append({"m": m, "arm": name, "ms": 1e3 * taken.seconds, "MB": alive.peak / 2**20, "runs": taken.runs})
            rows[-1]["gradients"] = taken.gradients
            print(rows[-1], flush=True)
        for row in rows:
            if row["m"] == m:
                exact = steps.get("Fisher, dense textbook" if "Fisher" in row["arm"] else dense_name())
                compared = "Fisher" in row["arm"] or "Hessian per sample" in row["arm"]
                if compared and exact is not None:
                    row["error"] = float((steps[row["arm"]] - exact).norm() / exact.norm())
    return rows


def errors(n: int = 40, m: int = 200) -> list[dict[str, Any]]:
    """Relative error and cosine of the per-sample step, by the products that were allowed.

    Once against the solve that it converges to, ``(|H_i| + d)^-1 g_i``, and once against the dense repaired step,
    which differs where the lowest eigenvalue lies between -d and 0.
    """
    y, t = torch.randn(2, n, m, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = []
    for name, loss, damping in (
        ("convex", convex_loss, 0.1),
        ("indefinite, as above", sample_loss, 0.1),
        ("half negative", waves, 0.1),
        ("half negative", waves, 0.01),
    ):
        g = torch.func.vmap(torch.func.grad(loss))(y, t)
        values, vectors = torch.linalg.eigh(torch.func.vmap(torch.func.hessian(loss))(y, t))
        inside = (vectors.mT @ g.unsqueeze(-1)).squeeze(-1)
        repaired = torch.where(values[:, :1] + damping > 0, values, values.abs())
        exact, dense = (
            (vectors @ (inside / (v + damping)).unsqueeze(-1)).squeeze(-1) for v in (values.abs(), repaired)
        )
        row: dict[str, Any] = {"loss": name, "negative": float((values < 0).double().mean()), "damping": damping}
        for most, tolerance in ((8, 0.03), (16, 0.01)):
            krylov = npl.Hessian("per_sample", products=most, tolerance=tolerance)
            step = npl.newton_step(lambda v, f=loss: f(v, t).mean(), y, curvature=krylov, damping=damping).step
            row[f"{most} products"] = float((step - exact).norm() / exact.norm())
            row[f"{most}, cosine"] = float((step * exact).sum() / (step.norm() * exact.norm()))
            row[f"{most}, from the dense repair"] = float((step - dense).norm() / dense.norm())
        rows.append(row)
    return rows


def dense_name() -> str:
    return "Hessian per sample, torch.func.hessian"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for name in dict.fromkeys(r["arm"] for r in rows):
        own = [r for r in rows if r["arm"] == name]
        style = "--" if "torch.func" in name or "textbook" in name or "curvlinops" in name else "-"
        for axis, key in zip(axes, ("ms", "MB"), strict=True):
            axis.loglog([r["m"] for r in own], [r[key] for r in own], style, marker=".", label=name)
    for axis, title in zip(axes, ("time of one step, ms", "peak memory, MB"), strict=True):
        axis.set(xlabel=f"outputs m (N = {N})", title=title)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="m <= 1000; writes nothing")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    arguments = parser.parse_args()
    quick = arguments.quick
    rows = measure(tuple(m for m in arguments.sizes if m <= 1000 or not quick))
    table = markdown([{**r, "gradients": round(r["gradients"], 1)} for r in rows])
    if quick:
        print(table)
        return
    per_sample, versions = errors(), {"torch": str(torch.__version__), "threads": torch.get_num_threads()}
    (RESULTS / "large_outputs.json").write_text(
        json.dumps({**versions, "rows": rows, "errors": per_sample}, indent=1) + "\n"
    )
    about = "Error of the per-sample step against (|H_i| + d)^-1 g_i, m = 200, 40 samples:"
    (RESULTS / "large_outputs.md").write_text(f"{table}\n\n{about}\n\n{markdown(per_sample)}\n")
    plot(rows, RESULTS / "large_outputs.png")


if __name__ == "__main__":
    main()
