"""Is an answer right? The optimality conditions in the user's units, and Clarabel's answer as the truth.

Every condition is a backward error: what it is off, divided by the sum of the absolute values of its terms. The size
1e-3 of a natural unit is added to the terms, so that zero counts as zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from benchmarks.qp_layers.programs import Program

__all__ = ["Truth", "backward_errors", "is_wrong", "truth"]

_FLOOR = 1e-3


def backward_errors(
    data: tuple[np.ndarray, ...], units: np.ndarray | None, x: np.ndarray, nu: np.ndarray, lam: np.ndarray
) -> dict[str, float]:
    """The largest error of each condition; ``data`` Q, p, A, b, G, h, ``units`` (n,) as in :class:`Program`."""
    Q, p, A, b, G, h = (np.asarray(part, dtype=float) for part in data)
    unit = np.ones(len(p)) if units is None else units
    C, c, y = np.concatenate([A, G]), np.concatenate([b, h]), np.concatenate([nu, lam])
    slack = c - C @ x
    terms = abs(c) + abs(C) @ (abs(x) + _FLOOR * unit)
    off = np.concatenate([abs(slack[: len(b)]), -slack[len(b) :]])
    gradient = abs(p) + abs(Q) @ abs(x) + abs(C).T @ abs(y)
    scale = float(max((gradient * unit).max(), _FLOOR))
    sizes = abs(G) @ unit
    tiny = 1e-300
    return {
        "feasibility": float((off / (terms + tiny)).max(initial=0.0)),
        "stationarity": float((abs(Q @ x + p + C.T @ y) * unit / (gradient * unit + _FLOOR * scale)).max()),
        "sign": float((-lam * sizes).max(initial=0.0)) / scale,
        "complementarity": float((abs(slack[len(b) :]) / (terms[len(b) :] + tiny) * (lam != 0)).max(initial=0.0)),
    }


@dataclass(frozen=True, eq=False)
class Truth:
    """Clarabel's answer at 1e-11, in natural units: x / units."""

    status: str
    x: np.ndarray
    data: tuple[np.ndarray, ...]
    """Q, p, A, b, G, h in natural units, rows of the length one."""
    rounding: float
    """By how much the objective is too low because Clarabel's x misses rows: the products with their multipliers."""

    @property
    def solved(self) -> bool:
        return self.status == "Solved"

    @property
    def infeasible(self) -> bool:
        return self.status == "PrimalInfeasible"

    def objective(self, x: np.ndarray) -> float:
        """At x in natural units."""
        return float(0.5 * x @ self.data[0] @ x + self.data[1] @ x)

    def violation(self, x: np.ndarray) -> np.ndarray:
        """(m + k,), by how much x misses each row."""
        _, _, A, b, G, h = self.data
        return np.concatenate([abs(A @ x - b), (G @ x - h).clip(0)])


def truth(program: Program, tolerance: float = 1e-11) -> Truth:
    """The answer of Clarabel to the program as it was before rounding to its dtype."""
    import clarabel
    from scipy import sparse

    unit = np.ones(len(program.p)) if program.units is None else program.units
    Q, p, A, b, G, h = program.data()
    Q, p = Q * np.outer(unit, unit), p * unit

    def rows(C: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        length = np.linalg.norm(C * unit, axis=1)
        length = np.where(length > 0, length, 1.0)
        return C * unit / length[:, None], c / length

    A, b, G, h = *rows(A, b), *rows(G, h)
    apart, beside = (A, b) if program.equalities is None else rows(*program.equalities)
    settings: Any = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = tolerance
    cones = ([clarabel.ZeroConeT(len(b))] if len(b) else []) + ([clarabel.NonnegativeConeT(len(h))] if len(h) else [])
    upper = sparse.triu(sparse.csc_matrix(Q)).tocsc()
    C, c = np.concatenate([apart, G]), np.concatenate([beside, h])
    answer = clarabel.DefaultSolver(upper, p, sparse.csc_matrix(C), c, cones, settings).solve()
    x, y = np.array(answer.x), np.array(answer.z)
    off = C @ x - c
    off[len(b) :] = off[len(b) :].clip(0)
    return Truth(str(answer.status), x, (Q, p, A, b, G, h), float(abs(y) @ abs(off)))


def is_wrong(program: Program, right: Truth, x: np.ndarray, tolerance: float) -> bool:
    """Whether x, which a solver calls the answer, is none: a row is missed, or the objective is too high.

    Without a truth of Clarabel (``right`` neither solved nor infeasible) only the rows count.
    """
    z = x.astype(float) if program.units is None else x / program.units
    size = 1.0 + abs(z).max()
    if not np.isfinite(z).all() or (right.violation(z) > tolerance * size).any():
        return True
    if right.infeasible:
        return program.dtype == "float64"  # of data in float32 the rows were judged
    if not right.solved:
        return False
    Q, p = right.data[:2]
    terms = 0.5 * abs(z) @ abs(Q) @ abs(z) + abs(p) @ abs(z) + _FLOOR
    return right.objective(z) - right.objective(right.x) > tolerance * terms + right.rounding
