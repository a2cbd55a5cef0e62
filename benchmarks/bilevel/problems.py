"""The three problems of ``python -m benchmarks.bilevel``: closures, a way to draw the next batch, a metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy


@dataclass
class Problem:
    """``draw()`` sets the batch that the closures see; ``metrics()`` maps names to numbers."""

    upper: list[Tensor]
    lower: list[Tensor]
    upper_closure: Callable[[], Tensor]
    lower_closure: Callable[[], Tensor]
    draw: Callable[[], None]
    metrics: Callable[[], dict[str, float]]
    warm_start: int = 0
    plain_closure: Callable[[], Tensor] | None = None


def quadratic(seed: int, lower_noise: float, n: int = 10, upper_noise: float = 3.0) -> Problem:
    """``G = 1/2 y'Ay - (Bx + e)'y``, ``F = 1/2 ||y - t||^2 + .05 ||x||^2 + e'x``, noise e; float64.

    The metric is the norm of the true hypergradient of the noise-free problem at x, over that at the start.
    """
    fixed = torch.Generator().manual_seed(12345)  # one problem, noise by seed
    noise = torch.Generator().manual_seed(seed)

    def normal(*shape: int, generator: torch.Generator = fixed) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    root, b, t = normal(n, n), normal(n, n) / n**0.5, 3 * normal(n)
    a = root @ root.T / n + 0.5 * torch.eye(n, dtype=torch.float64)
    x, y = normal(n).requires_grad_(), torch.zeros(n, dtype=torch.float64, requires_grad=True)
    samples: dict[str, Tensor] = {}

    def draw() -> None:
        samples["upper"] = upper_noise * normal(n, generator=noise)
        samples["lower"] = lower_noise * normal(n, generator=noise)

    def true_norm() -> float:
        best = torch.linalg.solve(a, b @ x.detach())
        h = 0.1 * x.detach() + b.T @ torch.linalg.solve(a, best - t)
        return float(h.norm())

    start = true_norm()
    return Problem(
        [x],
        [y],
        lambda: 0.5 * (y - t).square().sum() + samples["upper"] @ x + 0.05 * x.square().sum(),
        lambda: 0.5 * y @ a @ y - (b @ x + samples["lower"]) @ y,
        draw,
        lambda: {"gradient": true_norm() / start},
        warm_start=50,
    )


def _digits(seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    data = load_digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.target), generator=generator)
    images = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    return images, torch.tensor(data.target)[order], generator


def cleaning(seed: int, flipped: float = 0.2, batch: int = 100) -> Problem:
    """Softmax regression on 1000 digits, a fifth with wrong labels; weights sigmoid(x_i) judged by 300 clean ones."""
    images, labels, generator = _digits(seed)
    wrong = torch.rand(1000, generator=generator) < flipped
    shift = torch.randint(1, 10, (1000,), generator=generator)
    given = torch.where(wrong, (labels[:1000] + shift) % 10, labels[:1000])
    x = torch.zeros(1000, requires_grad=True)
    model = nn.Linear(64, 10)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    index: dict[str, Tensor] = {}

    def draw() -> None:
        index["train"] = torch.randint(0, 1000, (batch,), generator=generator)
        index["validation"] = torch.randint(1000, 1300, (batch,), generator=generator)

    def upper() -> Tensor:
        return cross_entropy(model(images[index["validation"]]), labels[index["validation"]])

    def lower() -> Tensor:
        i = index["train"]
        losses = cross_entropy(model(images[i]), given[i], reduction="none")
        return (x[i].sigmoid() * losses).mean() + 2e-3 * (model.weight.square().sum() + model.bias.square().sum())

    def metrics() -> dict[str, float]:
        with torch.no_grad():
            right = model(images[1300:]).argmax(-1) == labels[1300:]
        return {
            "auroc": float(roc_auc_score(wrong.numpy(), -x.detach().numpy())),
            "accuracy": 100 * right.double().mean().item(),
        }

    return Problem([x], list(model.parameters()), upper, lower, draw, metrics, warm_start=200)


def auc(seed: int, rate: float = 0.03, batch: int = 100) -> Problem:
    """Is it an 8? Positives thinned to 3 % of the training digits. min over (network, a, b), max over alpha."""
    # The objective is that of Ying, Wen and Lyu, NeurIPS 2016, divided by p (1 - p).
    images, labels, generator = _digits(seed)
    positive = labels == 8
    pool = torch.arange(1000)
    keep = pool[positive[:1000]][: int(rate * 1000)]
    pool = torch.cat([keep, pool[~positive[:1000]]])
    p = len(keep) / len(pool)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    a, b, alpha = (torch.zeros((), requires_grad=True) for _ in range(3))
    index: dict[str, Tensor] = {}

    def draw() -> None:
        index["train"] = pool[torch.randint(0, len(pool), (batch,), generator=generator)]

    def f() -> Tensor:
        i = index["train"]
        s, plus = net(images[i]).squeeze(-1), positive[i].float()
        minus = 1 - plus
        squares = (1 - p) * (s - a) ** 2 * plus + p * (s - b) ** 2 * minus
        gap = p * s * minus - (1 - p) * s * plus
        return ((squares + 2 * (1 + alpha) * gap).mean() - p * (1 - p) * alpha**2) / (p * (1 - p))

    def metrics() -> dict[str, float]:
        with torch.no_grad():
            scores = net(images[1300:]).squeeze(-1)
        return {"auc": float(roc_auc_score(positive[1300:].numpy(), scores.numpy()))}

    def plain() -> Tensor:
        i = index["train"]
        return binary_cross_entropy_with_logits(net(images[i]).squeeze(-1), positive[i].float())

    return Problem([*net.parameters(), a, b], [alpha], f, lambda: -f(), draw, metrics, plain_closure=plain)
