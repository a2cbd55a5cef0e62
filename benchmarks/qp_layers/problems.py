"""Quadratic programs whose solution and gradients are known before any solver runs.

Choose x*, the active rows, multipliers lam > 0 on them and slacks > 0 on the others; then p, h and b follow from the
KKT conditions, and x* is the exact answer up to rounding. The gradients come from one dense solve with the KKT matrix
of the active rows (``gradients``): the twin that every layer is compared with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

NAMES = ("Q", "p", "A", "b", "G", "h")
Matrices = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Problem:
    """A batch: arrays Q, p, A, b, G, h (matrices without a batch dimension where shared), x* and dL/dx."""

    arrays: dict[str, np.ndarray]
    x: np.ndarray
    nu: np.ndarray
    lam: np.ndarray
    seed_gradient: np.ndarray

    @property
    def shared(self) -> bool:
        return self.arrays["Q"].ndim == 2

    def leaves(self) -> dict[str, Tensor]:
        return {k: torch.tensor(v, requires_grad=True) for k, v in self.arrays.items()}

    def one(self, i: int) -> tuple[np.ndarray, ...]:
        return tuple(self.arrays[k] if self.shared and k in "QAG" else self.arrays[k][i] for k in NAMES)

    def gradients(self) -> dict[str, np.ndarray]:
        """All six gradients of <dL/dx, x*>, per element one solve with the KKT matrix of the active rows."""
        total = {k: np.zeros_like(v) for k, v in self.arrays.items()}
        for i in range(len(self.x)):
            Q, _, A, _, G, _ = self.one(i)
            n, e = len(Q), len(A)
            active = self.lam[i] > 0
            C = np.concatenate([A, G[active]])
            K = np.block([[Q, C.T], [C, np.zeros((len(C), len(C)))]])
            right = np.concatenate([-self.seed_gradient[i], np.zeros(len(C))])
            z = np.linalg.solve(K, right)
            z = z + np.linalg.solve(K, right - K @ z)
            z, w_a, w_g = z[:n], z[n : n + e], np.zeros(len(G))
            w_g[active] = np.linalg.solve(K, right)[n + e :]
            x, nu, lam = self.x[i], self.nu[i], self.lam[i]
            one = {"Q": 0.5 * (np.outer(z, x) + np.outer(x, z)), "p": z, "b": -w_a, "h": -w_g}
            one |= {"A": np.outer(w_a, x) + np.outer(nu, z), "G": np.outer(w_g, x) + np.outer(lam, z)}
            for k, v in one.items():
                if self.shared and k in "QAG":
                    total[k] += v
                else:
                    total[k][i] = v
        return total


def with_known_solution(
    matrices: Callable[[Generator], Matrices],
    point: Callable[[Generator, Matrices], tuple[np.ndarray, np.ndarray]],
    batch: int,
    shared: bool,
    seed: int,
) -> Problem:
    """``point`` gives x* and the active rows for the matrices; everything else follows."""
    rng = np.random.default_rng(seed)
    common = matrices(rng) if shared else None
    rows: dict[str, list[np.ndarray]] = {k: [] for k in (*NAMES, "x", "nu", "lam")}
    for _ in range(batch):
        Q, A, G = common if common is not None else matrices(rng)
        x, active = point(rng, (Q, A, G))
        nu = rng.standard_normal(len(A))
        lam = np.where(active, rng.uniform(0.5, 2.0, len(G)), 0.0)
        gap = np.where(active, 0.0, rng.uniform(0.1, 1.0, len(G)))
        values = (Q, -(Q @ x + A.T @ nu + G.T @ lam), A, A @ x, G, G @ x + gap, x, nu, lam)
        for key, value in zip(rows, values, strict=True):
            rows[key].append(value)
    arrays = {k: (rows[k][0] if shared and k in "QAG" else np.stack(rows[k])) for k in NAMES}
    x = np.stack(rows["x"])
    return Problem(arrays, x, np.stack(rows["nu"]), np.stack(rows["lam"]), rng.standard_normal(x.shape))


def random_qp(n: int, batch: int, active: float, *, shared: bool = False, seed: int = 0) -> Problem:
    """n inequalities of which the share ``active`` is active, n // 5 equalities, condition of Q 100."""

    def matrices(rng: Generator) -> Matrices:
        U = np.linalg.qr(rng.standard_normal((n, n)))[0]
        Q = (U * np.logspace(-1, 1, n)) @ U.T
        return (Q + Q.T) / 2, rng.standard_normal((n // 5, n)), rng.standard_normal((n, n))

    def point(rng: Generator, _: Matrices) -> tuple[np.ndarray, np.ndarray]:
        return rng.standard_normal(n), rng.permutation(n) < max(1, round(active * n))

    return with_known_solution(matrices, point, batch, shared, seed)


def portfolio(n: int, batch: int, *, seed: int = 0) -> Problem:
    """Long-only mean-variance with a cap on each weight: the covariance is shared, expected returns differ.

    Half of the assets lie at zero and a tenth at the cap, as in a real optimum.
    """
    cap = 4.0 / n

    def matrices(rng: Generator) -> Matrices:
        factors = rng.standard_normal((n, max(5, n // 20))) / np.sqrt(n)
        Q = factors @ factors.T + np.diag(rng.uniform(0.05, 0.2, n))
        return Q, np.ones((1, n)), np.concatenate([-np.eye(n), np.eye(n)])

    def point(rng: Generator, _: Matrices) -> tuple[np.ndarray, np.ndarray]:
        order = rng.permutation(n)
        zero, full = order < n // 2, order >= n - n // 10
        free = ~zero & ~full
        x = np.where(full, cap, 0.0)
        share = rng.uniform(0.5, 1.0, free.sum())
        x[free] = share / share.sum() * (1 - x.sum())
        return x, np.concatenate([zero, full])

    problem = with_known_solution(matrices, point, batch, True, seed)
    h = np.broadcast_to(np.concatenate([np.zeros(n), np.full(n, cap)]), (batch, 2 * n)).copy()
    return Problem({**problem.arrays, "h": h}, problem.x, problem.nu, problem.lam, problem.seed_gradient)


def relative_error(
    x: Tensor, leaves: dict[str, Tensor], problem: Problem, true: dict[str, np.ndarray]
) -> tuple[float, float]:
    """(of x, the largest of the six gradients), each relative to the largest entry of the true one."""
    worst = 0.0
    for name, value in true.items():
        got = leaves[name].grad
        if got is None or value.size == 0:
            continue
        found = got.detach().double().numpy()
        if name == "Q":  # layers differ in how they spread the derivative over Q_ij and Q_ji
            found = (found + np.swapaxes(found, -1, -2)) / 2
        error = np.abs(found - value).max() / np.abs(value).max()
        worst = max(worst, float("inf") if np.isnan(error) else float(error))
    return float(np.abs(x.detach().double().numpy() - problem.x).max() / np.abs(problem.x).max()), worst
