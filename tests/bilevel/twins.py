"""The four methods in dense NumPy, one formula after the other, on a problem with written-out derivatives.

``G = 1/2 y'Ay + 1/2 sum_i e^(x_i) y_i^2 + c/4 sum_i y_i^4 - (b + pi)'y``
``F = 1/2 ||y - t - xi||^2 + rho/2 ||x||^2 + x'y``, with noise pi (lower) and xi (upper), one of each a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


@dataclass
class NoisyProblem:
    """Derivatives for the twin, closures for the optimizers; ``sample(t)`` sets the noise of step t for both."""

    n: int = 5
    noise: float = 0.3
    rho: float = 0.1
    c: float = 0.05
    pi: Array = field(init=False)
    xi: Array = field(init=False)

    def __post_init__(self) -> None:
        generator = np.random.default_rng(0)
        root = generator.normal(size=(self.n, self.n))
        self.a = root @ root.T / self.n + np.eye(self.n)
        self.b, self.t, self.x0, self.y0 = generator.normal(size=(4, self.n))
        self.sample(0)

    def sample(self, step: int) -> None:
        self.pi, self.xi = self.noise * np.random.default_rng(100 + step).normal(size=(2, self.n))

    def upper_gradients(self, x: Array, y: Array) -> tuple[Array, Array]:
        return self.rho * x + y, y - self.t - self.xi + x

    def lower_gradient(self, x: Array, y: Array) -> Array:
        return self.a @ y + np.exp(x) * y + self.c * y**3 - self.b - self.pi

    def hessian(self, x: Array, y: Array) -> Array:
        return self.a + np.diag(np.exp(x) + 3 * self.c * y**2)

    def mixed(self, x: Array, y: Array) -> Array:
        return np.diag(np.exp(x) * y)

    def closures(self, x: list[Tensor], y: list[Tensor]) -> tuple[Any, Any]:
        a, b, t = (torch.from_numpy(v) for v in (self.a, self.b, self.t))

        def upper() -> Tensor:
            u, w = torch.cat(x), torch.cat(y)
            noisy = 0.5 * (w - t - torch.from_numpy(self.xi)).square().sum()
            return noisy + self.rho / 2 * u.square().sum() + u @ w

        def lower() -> Tensor:
            u, w = torch.cat(x), torch.cat(y)
            bowl = 0.5 * w @ a @ w + 0.5 * (u.exp() * w.square()).sum() + self.c / 4 * w.pow(4).sum()
            return bowl - (b + torch.from_numpy(self.pi)) @ w

        return upper, lower


class Twin:
    """What the methods have in common: h with its solver, where the scale is known or estimated."""

    def __init__(self, problem: NoisyProblem, **options: Any) -> None:
        self.problem = problem
        self.options = {"scale": None, "terms": 10, "lower_steps": 1, "lower_every": 1, "beta": 0.9, **options}
        self.x, self.y = problem.x0.copy(), problem.y0.copy()
        self.m: Array | None = None
        self.v: Array | None = None
        self.bound = 0.0
        self.steps = 0

    def scale(self) -> float:
        return self.options["scale"] or 1 / self.bound

    def series(self, hessian: Array, gy: Array) -> Array:
        if not self.bound:
            u = gy
            for _ in range(10):
                u = hessian @ (u / np.linalg.norm(u))
                self.bound = max(self.bound, float(np.linalg.norm(u)))
        s, seen = self.scale(), self.bound
        power, total = gy, gy
        for _ in range(self.options["terms"] - 1):
            image = hessian @ power
            seen = max(seen, float(np.linalg.norm(image) / np.linalg.norm(power)))
            power = power - s * image
            total = total + power
        self.bound = seen
        return s * total

    def h(self, x: Array, y: Array, v: Array | None = None) -> tuple[Array, Array]:
        """h and the v it was made with; a given v is used as it is."""
        gx, gy = self.problem.upper_gradients(x, y)
        hessian = self.problem.hessian(x, y)
        if v is not None:
            return gx - self.problem.mixed(x, y) @ v, v
        if self.options["solver"] == "cg":
            v = self.conjugate_gradients(hessian, gy)
        elif self.options["solver"] == "neumann":
            v = self.series(hessian, gy)
        else:
            v = self.series(hessian, gy) if self.v is None else self.v
            image = hessian @ v
            self.bound = max(self.bound, float(np.linalg.norm(image) / np.linalg.norm(v)))
            self.v = v - self.scale() * (image - gy)
        return gx - self.problem.mixed(x, y) @ v, v

    def conjugate_gradients(self, hessian: Array, gy: Array) -> Array:
        """By the definition: the best point of the Krylov space."""
        krylov = np.stack([np.linalg.matrix_power(hessian, q) @ gy for q in range(self.options["terms"])], 1)
        basis, _ = np.linalg.qr(krylov)
        return basis @ np.linalg.solve(basis.T @ hessian @ basis, basis.T @ gy)

    def ema(self, h: Array) -> Array:
        beta = self.options["beta"]
        return h if self.m is None else beta * self.m + (1 - beta) * h

    def descend(self) -> None:
        if self.steps % self.options["lower_every"] == 0:
            for _ in range(self.options["lower_steps"]):
                self.y = self.y - self.options["lr_lower"] * self.problem.lower_gradient(self.x, self.y)

    def step(self) -> None:
        self.advance()
        self.steps += 1

    def advance(self) -> None:
        raise NotImplementedError


class AccBOTwin(Twin):
    def __init__(self, problem: NoisyProblem, **options: Any) -> None:
        super().__init__(problem, **{"gamma": 0.5, "tau": 0.5, "solver": "linear", "estimator": "storm", **options})
        self.previous = self.average = self.y
        self.old: tuple[Array, Array, Array] | None = None

    def advance(self) -> None:
        o = self.options
        if self.steps % o["lower_every"] == 0:
            for _ in range(o["lower_steps"]):
                w = self.y + o["gamma"] * (self.y - self.previous)
                self.previous = self.y
                self.y = w - o["lr_lower"] * self.problem.lower_gradient(self.x, w)
                self.average = (1 - o["tau"]) * self.average + o["tau"] * self.y
        bound = self.bound
        h, v = self.h(self.x, self.average)
        if o["estimator"] == "ema" or self.old is None:
            self.m = self.ema(h)
        else:
            x, y, v_old = self.old
            new_bound, self.bound = self.bound, bound  # the old point sees the scale of the new one
            h_old, _ = self.h(x, y, v_old if o["solver"] == "linear" else None)
            self.bound = new_bound
            assert self.m is not None
            self.m = h + o["beta"] * (self.m - h_old)
        self.old = (self.x, self.average, v)
        self.x = self.x - o["lr_upper"] * self.m / np.linalg.norm(self.m)


class MASOBATwin(Twin):
    def __init__(self, problem: NoisyProblem, **options: Any) -> None:
        super().__init__(problem, **{"solver": "linear", **options})

    def advance(self) -> None:
        h, _ = self.h(self.x, self.y)
        self.m = self.ema(h)
        descent = self.options["lr_lower"] * self.problem.lower_gradient(self.x, self.y)
        self.x, self.y = self.x - self.options["lr_upper"] * self.m, self.y - descent


class BOREPTwin(Twin):
    def __init__(self, problem: NoisyProblem, **options: Any) -> None:
        super().__init__(problem, **{"solver": "neumann", "lower_steps": 3, "lower_every": 2, **options})

    def advance(self) -> None:
        self.descend()
        h, _ = self.h(self.x, self.y)
        self.m = self.ema(h)
        self.x = self.x - self.options["lr_upper"] * self.m / np.linalg.norm(self.m)


class StocBiOTwin(Twin):
    def __init__(self, problem: NoisyProblem, **options: Any) -> None:
        super().__init__(problem, **{"solver": "neumann", "lower_steps": 10, **options})

    def advance(self) -> None:
        self.descend()
        h, _ = self.h(self.x, self.y)
        self.x = self.x - self.options["lr_upper"] * h
