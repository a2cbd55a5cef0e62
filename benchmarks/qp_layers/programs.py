"""Random programs by class: what ordinary use brings, and what solvers fail on. Class and seed fix a program.

Each class is one fault that a solver had: units, degenerate corners, redundant rows, answers that are zero, data
rounded to float32, equalities that hardly differ, objectives whose own minimiser is far away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

__all__ = ["CLASSES", "Program", "draw"]


@dataclasses.dataclass
class Program:
    """minimise 1/2 x'Qx + p'x subject to A x = b, G x <= h."""

    Q: np.ndarray
    p: np.ndarray
    A: np.ndarray
    b: np.ndarray
    G: np.ndarray
    h: np.ndarray
    units: np.ndarray | None = None
    """(n,), x / units is of ordinary size; None: all are 1."""
    dtype: str = "float64"
    equalities: tuple[np.ndarray, np.ndarray] | None = None
    """The same as A, b but well conditioned, where A x = b is not."""
    name: str = ""
    seed: int = 0

    def data(self) -> tuple[np.ndarray, ...]:
        """Q, p, A, b, G, h."""
        return self.Q, self.p, self.A, self.b, self.G, self.h

    def rounded(self) -> tuple[np.ndarray, ...]:
        """The same in the dtype of the program: what a solver receives."""
        return tuple(part.astype(self.dtype) for part in self.data())

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The arguments of ``solve_qp``; constraints that are not there are None."""
        Q, p, A, b, G, h = (torch.from_numpy(part) for part in self.rounded())
        return Q, p, *((A, b) if len(b) else (None, None)), *((G, h) if len(h) else (None, None))


def _objective(rng: Generator, n: int, condition: float = 100.0) -> np.ndarray:
    U = np.linalg.qr(rng.standard_normal((n, n)))[0]
    Q = (U * condition ** (rng.random(n) - 0.5)) @ U.T
    return 0.5 * (Q + Q.T)


def _plain(rng: Generator, n: int = 0) -> Program:
    """Rows of all kinds around a feasible point."""
    n = n or int(rng.integers(1, 13))
    m, k = int(rng.integers(0, max(n // 3, 1))), int(rng.integers(0, 2 * n + 3))
    Q = _objective(rng, n, 10.0 ** rng.uniform(0, 4))
    A, G = rng.standard_normal((m, n)), rng.standard_normal((k, n))
    x = rng.standard_normal(n)
    p = 3 * rng.standard_normal(n)
    return Program(Q, p, A, A @ x, G, G @ x + rng.random(k) * (rng.random(k) < 0.8))


def _ill_conditioned(rng: Generator) -> Program:
    """An objective that hardly bends in some directions."""
    program = _plain(rng, int(rng.integers(2, 12)))
    return dataclasses.replace(program, Q=_objective(rng, len(program.p), 10.0 ** rng.uniform(4, 12)))


def _in_units(program: Program, rng: Generator, decades: float) -> Program:
    """The same program where variable j counts in units of 10^u_j and each row has a unit of its own."""
    n, m, k = len(program.p), len(program.b), len(program.h)
    unit, rows, more = (10.0 ** rng.uniform(-decades, decades, size) for size in (n, m, k))
    return dataclasses.replace(
        program,
        Q=program.Q / np.outer(unit, unit),
        p=program.p / unit,
        A=rows[:, None] * program.A / unit,
        b=rows * program.b,
        G=more[:, None] * program.G / unit,
        h=more * program.h,
        units=unit,
    )


def _other_units(one: Callable[[Generator], Program], decades: float) -> Callable[[Generator], Program]:
    return lambda rng: _in_units(one(rng), rng, decades)


def _diagonal(decades: float) -> Callable[[Generator], Program]:
    """Q is the identity in other units."""

    def one(rng: Generator) -> Program:
        program = _plain(rng)
        return _in_units(dataclasses.replace(program, Q=np.eye(len(program.p))), rng, decades)

    return one


def _apex(rng: Generator) -> Program:
    """The nearest point of a cone is its tip."""
    n = int(rng.integers(2, 9))
    k = int(rng.integers(n, 3 * n))
    G = rng.standard_normal((k, n))
    return Program(np.eye(n), -(G.T @ rng.random(k)), np.zeros((0, n)), np.zeros(0), G, np.zeros(k))


def _isotonic(rng: Generator) -> Program:
    """Isotonic and not negative; where z is negative the answer is zero, in part or everywhere."""
    n = int(rng.integers(2, 12))
    G = np.concatenate([np.eye(n)[:-1] - np.eye(n)[1:], -np.eye(n)])
    z = rng.standard_normal(n) + rng.choice([-3.0, -1.0, 0.0])
    return Program(np.eye(n), -z, np.zeros((0, n)), np.zeros(0), G, np.zeros(2 * n - 1))


def _square(rng: Generator) -> Program:
    """As many equalities as variables, b = 0."""
    n = int(rng.integers(1, 10))
    k = int(rng.integers(0, 5))
    A, G = rng.standard_normal((n, n)), rng.standard_normal((k, n))
    return Program(_objective(rng, n), rng.standard_normal(n), A, np.zeros(n), G, rng.random(k))


def _linear(rng: Generator) -> Program:
    """A bounded linear program."""
    n = int(rng.integers(1, 9))
    k = int(rng.integers(n + 1, 4 * n + 2))
    G = rng.standard_normal((k, n))
    x = rng.standard_normal(n)
    m = int(rng.integers(0, max(n // 2, 1)))
    A = rng.standard_normal((m, n))
    return Program(np.zeros((n, n)), -(G.T @ rng.random(k)), A, A @ x, G, G @ x + rng.random(k))


def _linear_zero(rng: Generator) -> Program:
    """A linear program whose optimum is zero: costs and resources that are not negative."""
    n = int(rng.integers(1, 9))
    k = int(rng.integers(0, n + 1))
    G = np.concatenate([-np.eye(n), rng.standard_normal((k, n))])
    h = np.concatenate([np.zeros(n), rng.choice([0.0, 1.0], k)])
    return Program(np.zeros((n, n)), rng.random(n) + 0.1, np.zeros((0, n)), np.zeros(0), G, h)


def _assignment(rng: Generator) -> Program:
    """Assignment: redundant equalities, degenerate vertices."""
    r = int(rng.integers(2, 5))
    A = np.concatenate([np.kron(np.eye(r), np.ones(r)), np.kron(np.ones(r), np.eye(r))])
    n = r * r
    return Program(np.zeros((n, n)), rng.random(n), A, np.ones(2 * r), -np.eye(n), np.zeros(n))


def _transport(rng: Generator, dtype: str = "float64") -> Program:
    """A quadratic transport plan: one equality too many, margins that agree up to rounding of the dtype."""
    r, s = int(rng.integers(2, 5)), int(rng.integers(2, 5))
    A = np.concatenate([np.kron(np.eye(r), np.ones(s)), np.kron(np.ones(r), np.eye(s))])
    n = r * s
    a, b = rng.random(r) + 0.1, rng.random(s) + 0.1
    right = np.concatenate([a / a.sum(), b / b.sum()])
    return Program(np.eye(n), rng.standard_normal(n), A, right, -np.eye(n), np.zeros(n), dtype=dtype)


def _flow(rng: Generator, dtype: str = "float64") -> Program:
    """Flow conservation at all nodes of a graph: the rows sum to zero."""
    nodes = int(rng.integers(3, 7))
    pairs = [(i, j) for i in range(nodes) for j in range(nodes) if i != j]
    edges = [pairs[i] for i in rng.permutation(len(pairs))[: 2 * nodes]] + [(i, (i + 1) % nodes) for i in range(nodes)]
    A = np.zeros((nodes, len(edges)))
    for e, (i, j) in enumerate(edges):
        A[i, e], A[j, e] = A[i, e] + 1, A[j, e] - 1
    n = len(edges)
    x = rng.random(n)
    return Program(np.eye(n), rng.standard_normal(n), A, A @ x, -np.eye(n), np.zeros(n), dtype=dtype)


def _twice(rng: Generator, dtype: str = "float64") -> Program:
    """Rows that stand there twice, in other multiples."""
    program = _plain(rng, int(rng.integers(4, 11)))
    m, k = len(program.b), len(program.h)
    a, g = rng.integers(0, max(m, 1), min(m, 2)), rng.integers(0, max(k, 1), min(k, 4))
    fa, fg = rng.uniform(0.1, 5, len(a)), rng.uniform(0.1, 5, len(g))
    return dataclasses.replace(
        program,
        A=np.concatenate([program.A, fa[:, None] * program.A[a]]),
        b=np.concatenate([program.b, fa * program.b[a]]),
        G=np.concatenate([program.G, fg[:, None] * program.G[g]]),
        h=np.concatenate([program.h, fg * program.h[g]]),
        dtype=dtype,
    )


def _nearly_dependent(rng: Generator) -> Program:
    """Two equalities that are 1e-9 to 1e-3 from dependent; their difference is exact in float64."""
    program = _plain(rng, int(rng.integers(4, 11)))
    n = len(program.p)
    x, a = rng.standard_normal(n), rng.standard_normal(n)
    A = np.stack([a, a + 10.0 ** rng.uniform(-9, -3) * rng.standard_normal(n)])
    b = A @ x
    far = np.linalg.norm(A[1] - A[0])
    apart = np.stack([A[0], (A[1] - A[0]) / far]), np.array([b[0], (b[1] - b[0]) / far])
    h = np.maximum(program.h, program.G @ x + 0.1 * rng.random(len(program.h)))
    return dataclasses.replace(program, A=A, b=b, h=h, equalities=apart)


def _pulled(rng: Generator) -> Program:
    """A box, and an objective whose own minimiser is far away."""
    n = int(rng.integers(1, 10))
    p = rng.standard_normal(n) * 10.0 ** rng.uniform(2, 8)
    G = np.concatenate([np.eye(n), -np.eye(n)])
    return Program(_objective(rng, n), p, np.zeros((0, n)), np.zeros(0), G, np.ones(2 * n))


def _singular(rng: Generator) -> Program:
    """Q of lower rank, in a box or with rows around a point."""
    program = _plain(rng, int(rng.integers(2, 9)))
    n = len(program.p)
    M = rng.standard_normal((n, int(rng.integers(1, n))))
    box = np.concatenate([np.eye(n), -np.eye(n)])
    x = np.linalg.lstsq(program.A, program.b, rcond=None)[0] if len(program.b) else np.zeros(n)
    return dataclasses.replace(
        program,
        Q=M @ M.T,
        G=np.concatenate([program.G, box]),
        h=np.concatenate([np.maximum(program.h, program.G @ x), box @ x + 1 + rng.random(2 * n)]),
    )


def _whole(rng: Generator) -> Program:
    """Small whole numbers: degenerate corners, dependent rows, sometimes no feasible point."""
    n = int(rng.integers(1, 7))
    m, k = int(rng.integers(0, 2)), int(rng.integers(1, 3 * n))
    A, G = rng.integers(-2, 3, (m, n)).astype(float), rng.integers(-2, 3, (k, n)).astype(float)
    b, h = rng.integers(-2, 3, m).astype(float), rng.integers(-1, 4, k).astype(float)
    M = rng.integers(-1, 2, (n, n)).astype(float)
    return Program(M @ M.T + np.eye(n), rng.integers(-3, 4, n).astype(float), A, b, G, h)


def _in_float32(one: Callable[..., Program]) -> Callable[[Generator], Program]:
    return lambda rng: one(rng, dtype="float32")


CLASSES: dict[str, Callable[[Generator], Program]] = {
    "plain": _plain,
    "units of 10^+-4": _other_units(_plain, 4),
    "units of 10^+-6": _other_units(_plain, 6),
    "units of 10^+-8": _other_units(_plain, 8),
    "diagonal, 10^+-6": _diagonal(6),
    "diagonal, 10^+-8": _diagonal(8),
    "condition 1e4 to 1e12": _ill_conditioned,
    "tip of a cone": _apex,
    "isotonic": _isotonic,
    "isotonic, 10^+-6": _other_units(_isotonic, 6),
    "square, b = 0": _square,
    "linear": _linear,
    "linear, 10^+-4": _other_units(_linear, 4),
    "linear, optimum 0": _linear_zero,
    "assignment": _assignment,
    "transport": _transport,
    "transport, float32": _in_float32(_transport),
    "flow, float32": _in_float32(_flow),
    "rows twice": _twice,
    "rows twice, float32": _in_float32(_twice),
    "nearly dependent": _nearly_dependent,
    "far minimiser": _pulled,
    "singular": _singular,
    "singular, 10^+-4": _other_units(_singular, 4),
    "whole numbers": _whole,
    "whole numbers, 10^+-4": _other_units(_whole, 4),
    "larger": lambda rng: _plain(rng, int(rng.integers(20, 60))),
    "larger, 10^+-6": _other_units(lambda rng: _plain(rng, int(rng.integers(20, 60))), 6),
}


def draw(name: str, seed: int) -> Program:
    """The program of this class and seed."""
    rng = np.random.default_rng([seed, sum(map(ord, name))])
    return dataclasses.replace(CLASSES[name](rng), name=name, seed=seed)
