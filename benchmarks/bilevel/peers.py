"""Hypergradients by ours, by TorchOpt and by a plain fixed-point iteration, on one functional lower problem.

TorchOpt is ``torchopt.diff.implicit.custom_root`` with its conjugate gradients. The fixed point is the iteration of
Grazzi et al. (ICML 2020), the method of their package hypertorch: ``v <- v - s (H v - b)`` through a graph of
``y - s grad_y G``. It is written here because the hypertorch that pip installs is another package.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from newton_plugin.bilevel import hypergradient

Params = tuple[Tensor, ...]


class WeightedClassifier:
    """n samples with weights sigmoid(x_i); a linear model or a network of one hidden layer; near its minimum."""

    def __init__(self, hidden: int | None, n: int = 1000, features: int = 64, classes: int = 10) -> None:
        generator = torch.Generator().manual_seed(0)
        self.z = torch.randn(n, features, generator=generator)
        truth = torch.randn(features, classes, generator=generator)
        self.labels = (self.z @ truth + 2 * torch.randn(n, classes, generator=generator)).argmax(-1)
        self.z_val = torch.randn(n // 2, features, generator=generator)
        self.labels_val = (self.z_val @ truth).argmax(-1)
        self.x = torch.randn(n, generator=generator).requires_grad_()
        widths = [features, classes] if hidden is None else [features, hidden, classes]
        self.y: Params = tuple(
            (torch.randn(a, b, generator=generator) / a**0.5).requires_grad_() for a, b in itertools.pairwise(widths)
        )
        optimizer = torch.optim.LBFGS(self.y, max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-6)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.lower(self.y, self.x.detach())
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)  # type: ignore[arg-type]

    def logits(self, y: Sequence[Tensor], z: Tensor) -> Tensor:
        for w in y[:-1]:
            z = torch.tanh(z @ w)
        return z @ y[-1]

    def lower(self, y: Sequence[Tensor], x: Tensor) -> Tensor:
        losses = cross_entropy(self.logits(y, self.z.to(x.dtype)), self.labels, reduction="none")
        return (x.sigmoid() * losses).mean() + 5e-3 * sum(w.square().sum() for w in y)

    def upper(self, y: Sequence[Tensor]) -> Tensor:
        return cross_entropy(self.logits(y, self.z_val.to(y[0].dtype)), self.labels_val)

    def largest_eigenvalue(self) -> float:
        """Of the lower Hessian, by power iteration."""
        gradient = torch.autograd.grad(self.lower(self.y, self.x), self.y, create_graph=True)
        u, size = [torch.ones_like(w) for w in self.y], 1.0
        for _ in range(50):
            size = float(sum(t.square().sum() for t in u)) ** 0.5
            u = list(torch.autograd.grad(gradient, self.y, [t / size for t in u], retain_graph=True))
        return float(sum(t.square().sum() for t in u)) ** 0.5

    def reference(self) -> Tensor:
        """The solution in float64 at the same point."""
        x = self.x.detach().double().requires_grad_()
        y = [w.detach().double().requires_grad_() for w in self.y]
        return hypergradient(lambda: self.upper(y), lambda: self.lower(y, x), [x], y, tol=1e-12)[0]


def ours(p: WeightedClassifier, iterations: int, **options: Any) -> Callable[[], Tensor]:
    def run() -> Tensor:
        closures = (lambda: p.upper(p.y), lambda: p.lower(p.y, p.x))
        return hypergradient(*closures, [p.x], p.y, terms=iterations, **{"tol": 1e-30, **options})[0]

    return run


def torchopt_cg(p: WeightedClassifier, iterations: int) -> Callable[[], Tensor]:
    import torchopt

    solve = torchopt.linear_solve.solve_cg(rtol=0.0, atol=0.0, maxiter=iterations)

    @torchopt.diff.implicit.custom_root(torch.func.grad(p.lower, argnums=0), argnums=1, solve=solve)
    def minimum(y: Params, x: Tensor) -> Params:
        return y

    def run() -> Tensor:
        solution = minimum(tuple(w.detach() for w in p.y), p.x)
        return torch.autograd.grad(p.upper(solution), p.x)[0]

    return run


def fixed_point(p: WeightedClassifier, iterations: int, scale: float) -> Callable[[], Tensor]:
    def run() -> Tensor:
        b = torch.autograd.grad(p.upper(p.y), p.y)
        gradient = torch.autograd.grad(p.lower(p.y, p.x), p.y, create_graph=True)
        image = [w - scale * g for w, g in zip(p.y, gradient, strict=True)]
        v = [scale * t for t in b]
        for _ in range(iterations - 1):
            moved = torch.autograd.grad(image, p.y, v, retain_graph=True)
            v = [m + scale * t for m, t in zip(moved, b, strict=True)]
        (through,) = torch.autograd.grad(image, p.x, [t / scale for t in v])
        return through

    return run
