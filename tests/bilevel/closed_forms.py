"""Bilevel problems whose hypergradient can be written down, each at its lower minimum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot


@dataclass
class Problem:
    """Closures, parameters (the lower ones at their minimum), and the true hypergradient."""

    upper_closure: Callable[[], Tensor]
    lower_closure: Callable[[], Tensor]
    upper: list[Tensor]
    lower: list[Tensor]
    expected: list[Tensor]


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _param(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_()


def quadratic() -> Problem:
    """``G = 1/2 y'Hy - y'Bx``, ``F = 1/2 ||y - t||^2 + 1/2 x'Cx``: ``h = Cx + B'H^-1 (y* - t)``."""
    root, b, c, t = _random(6, 6), _random(6, 4, seed=1), _random(4, 4, seed=2), _random(6, seed=3)
    h, c = root @ root.T + torch.eye(6, dtype=torch.float64), c + c.T
    x = _param(_random(4, seed=4))
    y = _param(torch.linalg.solve(h, b @ x))
    expected = c @ x + b.T @ torch.linalg.solve(h, y - t)
    return Problem(
        lambda: 0.5 * (y - t).square().sum() + 0.5 * x @ c @ x,
        lambda: 0.5 * y @ h @ y - y @ b @ x,
        [x],
        [y],
        [expected.detach()],
    )


def ridge() -> Problem:
    """``G = 1/2 ||Zy - u||^2 + 1/2 e^x ||y||^2``, F the squared error on other rows."""
    z, u, z_val, u_val = _random(9, 4), _random(9, seed=1), _random(7, 4, seed=2), _random(7, seed=3)
    x = _param(torch.tensor(-0.3, dtype=torch.float64))
    gram = z.T @ z + x.detach().exp() * torch.eye(4, dtype=torch.float64)
    y = _param(torch.linalg.solve(gram, z.T @ u))
    expected = -x.exp() * y @ torch.linalg.solve(gram, z_val.T @ (z_val @ y - u_val))
    return Problem(
        lambda: 0.5 * (z_val @ y - u_val).square().sum(),
        lambda: 0.5 * (z @ y - u).square().sum() + 0.5 * x.exp() * y.square().sum(),
        [x],
        [y],
        [expected.detach()],
    )


def weighted_least_squares() -> Problem:
    """``G = 1/2 sum_i s(x_i) (z_i'y - u_i)^2 + 0.05 ||y||^2``: ``h_i = -s'(x_i) (z_i'y - u_i) z_i'v``."""
    z, u, z_val, u_val = _random(12, 3), _random(12, seed=1), _random(8, 3, seed=2), _random(8, seed=3)
    x = _param(_random(12, seed=4))
    s = x.detach().sigmoid()
    h = z.T @ (s[:, None] * z) + 0.1 * torch.eye(3, dtype=torch.float64)
    y = _param(torch.linalg.solve(h, z.T @ (s * u)))
    v = torch.linalg.solve(h, z_val.T @ (z_val @ y.detach() - u_val))
    expected = -s * (1 - s) * (z @ y.detach() - u) * (z @ v)
    return Problem(
        lambda: 0.5 * (z_val @ y - u_val).square().sum(),
        lambda: 0.5 * (x.sigmoid() * (z @ y - u).square()).sum() + 0.05 * y.square().sum(),
        [x],
        [y],
        [expected],
    )


def softmax_cleaning() -> Problem:
    """Weighted softmax regression at its stationary point, where Newton's method put it; two lower tensors."""
    n, features, classes = 15, 3, 4
    z, z_val = _random(n, features), _random(9, features, seed=1)
    labels, labels_val = torch.arange(n) % classes, torch.arange(9) % classes
    x = _param(_random(n, seed=4))
    s = x.detach().sigmoid()
    rows = torch.cat([z, torch.ones(n, 1, dtype=torch.float64)], 1)  # the bias is a last column of weights
    w = torch.zeros(classes, features + 1, dtype=torch.float64)

    def gradients(w: Tensor) -> Tensor:  # of each sample's own loss, (n, classes, features + 1)
        return ((rows @ w.T).softmax(-1) - one_hot(labels, classes))[:, :, None] * rows[:, None, :]

    def hessian(w: Tensor) -> Tensor:
        p = (rows @ w.T).softmax(-1)
        inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        full = torch.einsum("i,iab,ic,id->acbd", s / n, inner, rows, rows).reshape(w.numel(), w.numel())
        return full + 0.02 * torch.eye(w.numel(), dtype=torch.float64)

    for _ in range(30):
        g = torch.einsum("i,iab->ab", s / n, gradients(w)) + 0.02 * w
        w = w - torch.linalg.solve(hessian(w), g.flatten()).reshape(w.shape)
    assert g.abs().max() < 1e-14

    weight, bias = _param(w[:, :-1]), _param(w[:, -1])
    rows_val = torch.cat([z_val, torch.ones(9, 1, dtype=torch.float64)], 1)
    error = (rows_val @ w.T).softmax(-1) - one_hot(labels_val, classes)
    v = torch.linalg.solve(hessian(w), (error.T @ rows_val / 9).flatten()).reshape(w.shape)
    expected = -s * (1 - s) / n * torch.einsum("iab,ab->i", gradients(w), v)

    def lower() -> Tensor:
        losses = cross_entropy(z @ weight.T + bias, labels, reduction="none")
        return (x.sigmoid() * losses).mean() + 0.01 * (weight.square().sum() + bias.square().sum())

    return Problem(lambda: cross_entropy(z_val @ weight.T + bias, labels_val), lower, [x], [weight, bias], [expected])


def auc() -> Problem:
    """AUC maximisation (Ying et al. 2016) as min over (w, a, b), max over alpha: ``F = f``, ``G = -f``.

    At the maximum ``grad_alpha f = 0``, so the hypergradient is ``grad_x f`` there (Danskin).
    """
    z, positive = _random(20, 3), torch.arange(20) % 5 == 0
    p = positive.double().mean()
    w, a, b = _param(_random(3, seed=5)), _param(_random(seed=6)), _param(_random(seed=7))
    plus, minus = positive.double(), (~positive).double()

    def f(w: Tensor, a: Tensor, b: Tensor, alpha: Tensor) -> Tensor:
        s = z @ w
        squares = (1 - p) * (s - a) ** 2 * plus + p * (s - b) ** 2 * minus
        gap = p * s * minus - (1 - p) * s * plus
        return (squares + 2 * (1 + alpha) * gap).mean() - p * (1 - p) * alpha**2

    scores = z @ w.detach()
    alpha = _param((p * scores * minus - (1 - p) * scores * plus).mean() / (p * (1 - p)))
    s, gap = scores, p * minus - (1 - p) * plus
    slope = (2 * (1 - p) * (s - a.detach()) * plus + 2 * p * (s - b.detach()) * minus) + 2 * (1 + alpha) * gap
    expected = [
        (z * slope.detach()[:, None]).mean(0),
        (-2 * (1 - p) * (s - a.detach()) * plus).mean(),
        (-2 * p * (s - b.detach()) * minus).mean(),
    ]
    return Problem(lambda: f(w, a, b, alpha), lambda: -f(w, a, b, alpha), [w, a, b], [alpha], expected)


PROBLEMS = [quadratic, ridge, weighted_least_squares, softmax_cleaning, auc]
