"""How good are estimated gradients and Hessians of smoothed solvers? Error against the number of solver calls.

    python -m benchmarks.smoothing [--quick | --times | --newton]

Solvers under a loss that is linear in the solution (Hamming distance to a target, gradient w = 1 - 2 target):

* classes: the highest of 10 scores, Gumbel noise; the limit is a softmax, known in closed form;
* assignments: 5 x 5, Gaussian noise; the limit is a long run;
* paths: 12 x 12 maps, Gaussian noise of two scales, ``shortest_path`` (it refuses negative costs, so they are clamped
  at 0; that makes the problem not quite linear, the more the larger the noise); the limit is a long run, too.

For each estimator: the cosine to the limit, averaged over problems and draws, and the relative error
``(mean |g - g*|^2 / |g*|^2)^1/2``, with the calls of the solver for one gradient (forward and backward). The textbook
row is written here once more, without the package: ``g = mean e <p, w> / sigma``, what Berthet et al. publish and
PyEPO's perturbed optimizer computes, with no autograd around it. Time: forward + backward of textbook and ours,
interleaved in one process on one thread, medians of CPU time. Newton steps in output space: of losses on 8 x 8 maps,
with the Hessian that the loss brings and by double backward (the same noise, of which only the score is known), against
loss and gradient alone. Writes results/smoothing.json and results/smoothing.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import newton_plugin as npl
from newton_plugin.algorithms import FenchelYoungLoss, PerturbedOptimizer, StochasticSmoothing, shortest_path

RESULTS = Path(__file__).parent / "results"
PERMUTATIONS = torch.stack([torch.eye(5)[list(p)] for p in itertools.permutations(range(5))])
ESTIMATORS: dict[str, dict[str, Any]] = {
    "score, no baseline": {"baseline": "none"},
    "score, leave-one-out": {},
    "score, f(y) as baseline": {"baseline": "value"},
    "score, mirrored noise": {"antithetic": True},
    "symmetric score": {"estimator": "symmetric_score"},
    "differences, width 0.5": {"estimator": "finite_difference", "width": 0.5},
    "differences, width 1": {"estimator": "finite_difference", "width": 1.0},
    "differences, width 2": {"estimator": "finite_difference", "width": 2.0},
}


def classes(scores: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)


def assignments(rewards: Tensor) -> Tensor:
    best = (rewards.flatten(1) @ PERMUTATIONS.to(rewards.dtype).flatten(1).mT).argmax(-1)
    return PERMUTATIONS.to(rewards.dtype)[best]


def paths(costs: Tensor) -> Tensor:
    return shortest_path(costs.clamp(min=0)).path


@dataclass
class Problem:
    """N inputs y, the gradient w of the loss, and how to smooth."""

    name: str
    solver: Callable[[Tensor], Tensor]
    y: Tensor
    w: Tensor
    sigma: float
    noise: str = "gaussian"
    minimize: bool = False

    def smooth(self, samples: int, seed: int, **options: Any) -> PerturbedOptimizer:
        if self.noise == "gumbel" and options.get("antithetic"):
            options = {}
        return PerturbedOptimizer(
            self.solver,
            samples=samples,
            sigma=self.sigma,
            noise=self.noise,
            minimize=self.minimize,
            generator=torch.Generator().manual_seed(seed),
            **options,
        )

    def gradient(self, samples: int, seed: int, repeat: int = 1, **options: Any) -> Tensor:
        """(repeat, N, ...): independent estimates."""
        y = self.y.repeat(repeat, *[1] * (self.y.ndim - 1)).requires_grad_()
        value = (self.smooth(samples, seed, **options)(y).unflatten(0, (repeat, -1)) * self.w).sum()
        return torch.autograd.grad(value, y)[0].unflatten(0, (repeat, -1))

    def long_run(self, samples: int, seed: int, chunk: int, **options: Any) -> Tensor:
        parts = [self.gradient(chunk, seed + k, **options)[0] for k in range(max(1, samples // chunk))]
        return torch.stack(parts).mean(0)


def make_problems(count: int) -> list[Problem]:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(count, 10, generator=g, dtype=torch.float64)
    classes_target = classes(torch.randn(count, 10, generator=g, dtype=torch.float64))
    rewards = torch.randn(count, 5, 5, generator=g, dtype=torch.float64)
    noisy = rewards + torch.randn(count, 5, 5, generator=g, dtype=torch.float64)
    # Five terrains in regions, and costs that a half-trained network may have.
    height = torch.nn.functional.avg_pool2d(torch.rand(count, 1, 14, 14, generator=g), 3, 1).squeeze(1)
    level = torch.stack([height.flatten(1).quantile(q, -1) for q in (0.2, 0.4, 0.6, 0.8)], -1)
    terrain = (height.unsqueeze(-1) > level[:, None, None]).sum(-1)
    true = torch.tensor([0.8, 1.2, 5.3, 7.7, 9.2], dtype=torch.float64)[terrain]
    learned = true * torch.exp(0.5 * torch.randn(true.shape, generator=g, dtype=torch.float64))
    return [
        Problem("classes", classes, scores, 1 - 2 * classes_target, 1.0, "gumbel"),
        Problem("assignments", assignments, noisy, 1 - 2 * assignments(rewards), 0.5),
        Problem("paths, sigma 1", paths, learned, 1 - 2 * paths(true), 1.0, minimize=True),
        Problem("paths, sigma 0.25", paths, learned, 1 - 2 * paths(true), 0.25, minimize=True),
    ]


def errors(estimates: Tensor, limit: Tensor) -> dict[str, float]:
    """Cosine and relative error of (R, N, ...) estimates of (N, ...)."""
    a, b = estimates.flatten(2), limit.flatten(1).expand_as(estimates.flatten(2))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item()
    return {"cosine": cosine, "error": ((a - b).square().sum() / b.square().sum()).sqrt().item()}


def limit_of(problem: Problem, quick: bool) -> tuple[Tensor, float]:
    """The gradient in the limit, and the cosine of its two halves (1 where it is a formula)."""
    if problem.name == "classes":
        y = problem.y.clone().requires_grad_()
        value = (torch.softmax(y / problem.sigma, -1) * problem.w).sum()
        return torch.autograd.grad(value, y)[0], 1.0
    samples, chunk = (400_000, 10_000) if problem.name == "assignments" else (100_000, 1000)
    samples = samples // 20 if quick else samples
    halves = [problem.long_run(samples, seed, chunk) for seed in (10**6, 2 * 10**6)]
    return (halves[0] + halves[1]) / 2, errors(halves[0].unsqueeze(0), halves[1])["cosine"]


def textbook(problem: Problem, samples: int, seed: int, repeat: int) -> Tensor:
    """Without the package."""
    y = problem.y.repeat(repeat, *[1] * (problem.y.ndim - 1))
    shape, generator = (samples, *y.shape), torch.Generator().manual_seed(seed)
    sign = -1 if problem.minimize else 1
    if problem.noise == "gumbel":
        e = -torch.empty(shape, dtype=y.dtype).exponential_(generator=generator).log() - 0.5772156649015329
        score = 1 - torch.exp(-e - 0.5772156649015329)
    else:
        score = e = torch.randn(shape, dtype=y.dtype, generator=generator)
    p = problem.solver((y + sign * problem.sigma * e).flatten(0, 1)).unflatten(0, shape[:2])
    w = problem.w.repeat(repeat, *[1] * (problem.w.ndim - 1))
    weight = (p * w).flatten(2).sum(-1).reshape(samples, -1, *[1] * (y.ndim - 1))
    return (sign * (weight * score).mean(0) / problem.sigma).unflatten(0, (repeat, -1))


def gradients(problem: Problem, limit: Tensor, sizes: list[int], draws: int) -> list[dict]:
    """Every estimator at every number of samples."""
    rows = []
    for samples, (name, options) in itertools.product(sizes, {"textbook": None, **ESTIMATORS}.items()):
        if problem.noise == "gumbel" and options is not None and options.get("antithetic"):
            continue
        repeat = max(1, draws // samples)
        if options is None:
            estimates = textbook(problem, samples, 1, repeat)
        else:
            estimates = problem.gradient(samples, 1, repeat, **options)
        extra = {"f(y)": 1, "diff": samples}.get(next((k for k in ("f(y)", "diff") if k in name), ""), 0)
        row = {"problem": problem.name, "estimator": name, "samples": samples, "calls": samples + extra}
        rows.append({**row, **errors(estimates, limit)})
    return rows


def biases(problem: Problem, limit: Tensor, quick: bool) -> list[dict]:
    """Differences of many samples: what is left is their bias."""
    samples, chunk = (4000, 1000) if "paths" in problem.name else (40_000, 10_000)
    samples, chunk = (samples // 10, chunk // 10) if quick else (samples, chunk)
    rows = []
    for width in (0.1, 0.25, 0.5, 1.0, 2.0, 4.0):
        g = problem.long_run(samples, 3, chunk, estimator="finite_difference", width=width)
        ratio = (g.flatten(1).norm(dim=-1) / limit.flatten(1).norm(dim=-1)).mean().item()
        rows.append({"problem": problem.name, "width": width, "length": ratio, **errors(g.unsqueeze(0), limit)})
    return rows


def hessians(problem: Problem, sizes: list[int], draws: int) -> list[dict]:
    """Of the smoothed Hamming loss and of the Fenchel-Young loss, for classes: both limits are formulas."""
    target = (1 - problem.w) / 2
    flat = problem.y.shape[-1]

    def exact(loss: Callable[[Tensor], Tensor]) -> Tensor:
        blocks = torch.func.hessian(lambda y: loss(y).sum())(problem.y)
        return torch.stack([blocks[i, :, i] for i in range(len(blocks))])

    def estimate(loss: Callable[[Tensor], Tensor], repeat: int) -> Tensor:
        y = problem.y.repeat(repeat, 1).requires_grad_()
        (g,) = torch.autograd.grad(loss(y).sum(), y, create_graph=True)
        rows = [torch.autograd.grad(g[:, j].sum(), y, retain_graph=True)[0] for j in range(flat)]
        return torch.stack(rows, 1).unflatten(0, (repeat, -1))

    limits = {
        "smoothed Hamming": exact(lambda y: (torch.softmax(y, -1) * problem.w).sum(-1)),
        "Fenchel-Young": exact(lambda y: torch.logsumexp(y, -1) - (y * target).sum(-1)),
    }
    rows = []
    options: dict[str, dict[str, Any]] = {k: v for k, v in ESTIMATORS.items() if "mirrored" not in k}
    for samples, (name, option) in itertools.product(sizes, options.items()):
        repeat = max(1, draws // samples)
        w = problem.w.repeat(repeat, 1)
        smooth = problem.smooth(samples, 1, **option)
        estimates = {"smoothed Hamming": estimate(lambda y, s=smooth, w=w: (s(y) * w).sum(-1), repeat)}
        if option.get("estimator") is None:
            loss = FenchelYoungLoss(
                problem.solver,
                samples=samples,
                sigma=problem.sigma,
                noise=problem.noise,
                reduction="none",
                generator=torch.Generator().manual_seed(1),
                **option,
            )
            many = target.repeat(repeat, 1)
            estimates["Fenchel-Young"] = estimate(lambda y, f=loss, t=many: f(y, t), repeat)
        for what, h in estimates.items():
            row = {"loss": what, "estimator": name, "samples": samples}
            rows.append({**row, **errors(h, limits[what])})
    return rows


def times(problem: Problem, samples: int, rounds: int) -> list[dict]:
    """Forward + backward of the whole batch, interleaved; CPU time, which other work on the machine disturbs less."""
    functions: dict[str, Callable[[], Any]] = {
        "solver alone": lambda: problem.solver(problem.y.repeat(samples, *[1] * (problem.y.ndim - 1))),
        "textbook": partial(textbook, problem, samples, 1, 1),
        "score": partial(problem.gradient, samples, 1),
        "symmetric score": partial(problem.gradient, samples, 1, estimator="symmetric_score"),
        "differences": partial(problem.gradient, samples, 1, estimator="finite_difference"),
    }
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, f in functions.items():
            start = time.process_time()
            f()
            taken[name].append(1e3 * (time.process_time() - start))
    kept = {name: values[1:] for name, values in taken.items()}  # the first round warms up
    rows = []
    for name, values in kept.items():
        ratio = statistics.median(v / b for v, b in zip(values, kept["textbook"], strict=True))
        row = {"problem": problem.name, "batch": len(problem.y), "samples": samples, "what": name}
        rows.append({**row, "ms": statistics.median(values), "ratio": ratio})
    return rows


class PlainGaussian:
    """Gaussian noise that does not say the slope of its score: its losses are differentiated twice."""

    symmetric, has_mean = True, True

    def sample(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.empty_like(like).normal_(generator=generator)

    def log_ratio(self, noise: Tensor, shift: Tensor) -> Tensor:
        return torch.einsum("knm,nm->kn", noise, shift) - shift.square().sum(-1) / 2

    def score(self, noise: Tensor) -> Tensor:
        return noise


def newton_times(samples: int = 30, size: int = 8, count: int = 32, rounds: int = 41) -> list[dict]:
    """One step in output space, mean C, float32, interleaved; CPU time."""
    g = torch.Generator().manual_seed(0)
    y, true = (torch.rand(count, size, size, generator=g) + 0.1 for _ in range(2))
    target, rows = paths(true), []
    w = 1 - 2 * target
    options: dict[str, Any] = {"samples": samples, "sigma": 0.5, "generator": torch.Generator().manual_seed(1)}

    def hamming(noise: Any) -> Callable[[Tensor], Tensor]:
        each = lambda c: (paths(c).unflatten(0, (-1, count)) * w).flatten(0, 1).sum((-2, -1))  # noqa: E731
        smooth = StochasticSmoothing(each, noise=noise, **options)
        return lambda y: smooth(y).mean()

    def observed(noise: Any) -> Callable[[Tensor], Tensor]:
        loss = FenchelYoungLoss(paths, minimize=True, noise=noise, **options)
        return lambda y: loss(y, target)

    def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
        x = y.clone().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0]

    for what, make in (("smoothed Hamming", hamming), ("Fenchel-Young", observed)):
        step = partial(npl.newton_step, curvature="hessian", damping=0.1)
        plain, known, unknown = make("gaussian"), make("gaussian"), make(PlainGaussian())
        functions: dict[str, Callable[[], Any]] = {
            "loss and gradient": partial(gradient, plain),
            "Newton step": partial(step, known, y),
            "Newton step, double backward": partial(step, unknown, y),
        }
        taken: dict[str, list[float]] = {name: [] for name in functions}
        for turn in range(rounds):
            for name, f in functions.items():
                start = time.process_time()
                f()
                if turn:
                    taken[name].append(1e3 * (time.process_time() - start))
        for name, values in taken.items():
            ratio = statistics.median(v / b for v, b in zip(values, taken["loss and gradient"], strict=True))
            rows.append({"loss": what, "step": name, "ms": statistics.median(values), "ratio": ratio})
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(result: dict) -> str:
    """Markdown from the JSON."""
    sizes = sorted({r["samples"] for r in result["gradients"]})
    text = ["# Smoothed solvers: estimators of gradients and Hessians\n"]
    text.append(f"`python -m benchmarks.smoothing`; {result['machine']}, torch {result['torch']}, one thread.\n")
    text.append(
        "Cosine to the limit (relative error), averaged over problems and draws. `K` noise samples per problem; the "
        "score estimators call the solver K times per problem, f(y) once more, differences 2 K times (K forward, K "
        "backward).\n"
    )
    for name, self_cosine in result["limits"].items():
        rows = [r for r in result["gradients"] if r["problem"] == name]
        cells: dict[str, list[str]] = {}
        for r in rows:
            cells.setdefault(r["estimator"], [r["estimator"]]).append(f"{r['cosine']:.2f} ({r['error']:.2f})")
        note = "closed form" if self_cosine == 1 else f"halves of its long run have cosine {self_cosine:.3f}"
        text.append(f"## Gradient: {name} (limit: {note})\n")
        text.append(table(["estimator", *(f"K = {k}" for k in sizes)], list(cells.values())) + "\n")
    text.append("## Bias of the differences: very many samples, by width\n")
    text.append("Cosine to the limit, and length relative to it.\n")
    widths = sorted({r["width"] for r in result["biases"]})
    rows = []
    for name in result["limits"]:
        own = {r["width"]: r for r in result["biases"] if r["problem"] == name}
        rows.append([name, *(f"{own[w]['cosine']:.3f}, {own[w]['length']:.2f}" for w in widths)])
    text.append(table(["problem", *(f"width {w:g}" for w in widths)], rows) + "\n")
    text.append("## Hessian: classes (limit: closed form)\n")
    text.append("Cosine (relative error) of each problem's 10 x 10 matrix.\n")
    cells = {}
    for r in result["hessians"]:
        key = f"{r['loss']}: {r['estimator']}"
        cells.setdefault(key, [key]).append(f"{r['cosine']:.2f} ({r['error']:.2f})")
    hessian_sizes = sorted({r["samples"] for r in result["hessians"]})
    text.append(table(["loss: estimator", *(f"K = {k}" for k in hessian_sizes)], list(cells.values())) + "\n")
    text.append("## CPU time of forward + backward, the whole batch\n")
    rows = [
        [r["problem"], str(r["batch"]), str(r["samples"]), r["what"], f"{r['ms']:.2f}", f"{r['ratio']:.2f}"]
        for r in result["times"]
    ]
    text.append(table(["problem", "N", "K", "what", "ms", "relative to textbook"], rows) + "\n")
    text.append("## CPU time of a Newton step in output space: 8 x 8 maps, N = 32, K = 30\n")
    rows = [[r["loss"], r["step"], f"{r['ms']:.2f}", f"{r['ratio']:.2f}"] for r in result["newton"]]
    text.append(table(["loss", "step", "ms", "relative to loss and gradient"], rows))
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer draws; writes nothing")
    parser.add_argument("--times", action="store_true", help="measure the times anew and keep the other results")
    parser.add_argument("--newton", action="store_true", help="measure the Newton steps anew and keep the rest")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.newton:
        write(json.loads((RESULTS / "smoothing.json").read_text()) | {"newton": newton_times()})
        return
    problems = make_problems(16)
    if args.times:
        result = json.loads((RESULTS / "smoothing.json").read_text())
        result["times"] = [row for p in problems for samples in (10, 100) for row in times(p, samples, 101)]
        write(result)
        return
    sizes, draws = [4, 10, 30, 100], 100 if args.quick else 400
    machine = platform.processor() or platform.machine()
    result: dict[str, Any] = {"machine": machine, "torch": torch.__version__, "limits": {}}
    result |= {"gradients": [], "biases": [], "times": []}
    for problem in problems:
        limit, result["limits"][problem.name] = limit_of(problem, args.quick)
        result["gradients"] += gradients(problem, limit, sizes, draws)
        result["biases"] += biases(problem, limit, args.quick)
        for samples in (10, 100):
            result["times"] += times(problem, samples, 5 if args.quick else 31)
        print(f"{problem.name} done", flush=True)
    result["hessians"] = hessians(problems[0], [10, 100, 1000], 10 * draws)
    result["newton"] = newton_times(rounds=5 if args.quick else 41)
    if args.quick:
        print(report(result))
    else:
        write(result)


def write(result: dict) -> None:
    """The files, and the tables on the screen."""
    print(report(result))
    (RESULTS / "smoothing.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "smoothing.md").write_text(report(result))


if __name__ == "__main__":
    main()
