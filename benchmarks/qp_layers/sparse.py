"""Sparse programs for ``qp_layers``: a chain of stages, as in model predictive control, at n = 1,000 and 5,000.

Each variable is coupled with its neighbours in Q, each of n/5 equalities ties five neighbouring variables together,
and each of n inequalities bounds the difference of two variables. What is differentiated are the stored values, the
pattern is fixed. The twin is a sparse LU of the KKT matrix of the active rows (scipy).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from benchmarks.tables import markdown
from scipy import sparse
from scipy.sparse.linalg import splu
from torch import Tensor

Matrix = sparse.csc_array


@dataclass(frozen=True, eq=False)
class SparseProblem:
    matrices: dict[str, Any]  # Q, A, G: COO, entries sorted by rows
    vectors: dict[str, np.ndarray]  # p, b, h
    x: np.ndarray
    nu: np.ndarray
    lam: np.ndarray
    seed_gradient: np.ndarray

    def leaves(self) -> dict[str, Tensor]:
        values = {k: m.data for k, m in self.matrices.items()} | self.vectors
        return {k: torch.tensor(v, requires_grad=True) for k, v in values.items()}

    def gradients(self) -> dict[str, np.ndarray]:
        Q, A, G = (self.matrices[k] for k in "QAG")
        n, active = len(self.x), self.lam > 0
        C = sparse.vstack([A, sparse.csr_array(G)[active]])
        K = sparse.csc_array(sparse.block_array([[Q, C.T], [C, None]]))
        right = np.concatenate([-self.seed_gradient, np.zeros(C.shape[0])])
        factor = splu(K)
        solution = factor.solve(right)
        solution += factor.solve(right - K @ solution)
        z, w_a, w_g = solution[:n], solution[n : n + A.shape[0]], np.zeros(G.shape[0])
        w_g[active] = solution[n + A.shape[0] :]
        x, nu, lam = self.x, self.nu, self.lam
        out = {"p": z, "b": -w_a, "h": -w_g}
        out["Q"] = (z[Q.row] * x[Q.col] + x[Q.row] * z[Q.col]) / 2
        for key, M, w, dual in (("A", A, w_a, nu), ("G", G, w_g, lam)):
            out[key] = w[M.row] * x[M.col] + dual[M.row] * z[M.col]
        return out


def chain(n: int, active: float = 0.4, seed: int = 0) -> SparseProblem:
    """x*, the active share of the inequalities and the multipliers first; p, b and h follow from them."""
    rng = np.random.default_rng(seed)
    off = rng.uniform(-1, 1, n - 1)
    Q = sparse.diags_array([off, rng.uniform(2.5, 4.0, n), off], offsets=[-1, 0, 1])
    stages = np.arange(n // 5)
    A = sparse.coo_array(
        (rng.standard_normal(5 * len(stages)), (stages.repeat(5), np.arange(5 * len(stages)))), (len(stages), n)
    )
    row = np.arange(n)
    columns = np.stack([row, (row + 7) % n], 1).ravel()
    G = sparse.coo_array((np.tile([1.0, -1.0], n), (row.repeat(2), columns)), (n, n))
    on = rng.permutation(n) < round(active * n)
    x, nu = rng.standard_normal(n), rng.standard_normal(len(stages))
    lam = np.where(on, rng.uniform(0.5, 2.0, n), 0.0)
    gap = np.where(on, 0.0, rng.uniform(0.1, 1.0, n))
    vectors = {"p": -(Q @ x + A.T @ nu + G.T @ lam), "b": A @ x, "h": G @ x + gap}
    matrices = {k: sparse.coo_array(sparse.csr_array(M)) for k, M in {"Q": Q, "A": A, "G": G}.items()}
    return SparseProblem(matrices, vectors, x, nu, lam, rng.standard_normal(n))


def error(x: Tensor, t: dict[str, Tensor], problem: SparseProblem) -> tuple[float, float]:
    worst = 0.0
    for name, value in problem.gradients().items():
        grad = t[name].grad
        assert grad is not None
        found = grad.numpy()
        if name == "Q":  # layers differ in how they spread the derivative over Q_ij and Q_ji
            Q = problem.matrices["Q"]
            square = sparse.csr_array((found, (Q.row, Q.col)), Q.shape)
            found = sparse.csr_array((square + square.T) / 2)[Q.row, Q.col]
        worst = max(worst, float(np.abs(found - value).max() / np.abs(value).max()))
    return float(np.abs(x.detach().numpy().ravel() - problem.x).max() / np.abs(problem.x).max()), worst


def ours(solver: str, problem: SparseProblem) -> Callable:
    from newton_plugin.convex import solve_qp

    index = {k: torch.tensor(np.stack([m.row, m.col])) for k, m in problem.matrices.items()}
    shape = {k: m.shape for k, m in problem.matrices.items()}

    def run(t: dict[str, Tensor], g: Tensor, _: object) -> Tensor:
        Q, A, G = (_coo(index[k], t[k], shape[k]) for k in "QAG")
        x = solve_qp(Q, t["p"], A, t["b"], G, t["h"], solver=solver).x
        (x * g).sum().backward()
        return x

    return run


def _coo(index: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    return torch.sparse_coo_tensor(index, values, shape, is_coalesced=True, check_invariants=False)


def moreau(problem: SparseProblem) -> Callable:
    import moreau
    from moreau.torch import Solver

    def compressed(m: Any) -> tuple[Tensor, Tensor]:
        csr = sparse.csr_array(m)
        return torch.tensor(csr.indptr, dtype=torch.int64), torch.tensor(csr.indices, dtype=torch.int64)

    Q, A, G = (problem.matrices[k] for k in "QAG")
    settings = moreau.Settings(device="cpu", enable_grad=True, max_iter=10000)
    cones = moreau.Cones(num_zero_cones=A.shape[0], num_nonneg_cones=G.shape[0])
    rows = A.shape[0] + G.shape[0]
    built = Solver(len(problem.x), rows, *compressed(Q), *compressed(sparse.vstack([A, G])), cones, settings)

    def run(t: dict[str, Tensor], g: Tensor, _: object) -> Tensor:
        x = built.solve(t["Q"], torch.cat([t["A"], t["G"]]), t["p"], torch.cat([t["b"], t["h"]])).x
        (x * g).sum().backward()
        return x

    return run


def recipe(eps: float, problem: SparseProblem) -> Callable:
    """OSQP forward and OSQP backward, as in ``peers``, on the stored values."""
    from benchmarks.qp_layers.peers import osqp_solve

    Q, A, G = (problem.matrices[k] for k in "QAG")
    n, e = len(problem.x), A.shape[0]

    def run(t: dict[str, Tensor], g: Tensor, _: object) -> Tensor:
        a = {k: v.detach().numpy() for k, v in t.items()}
        P, C_a, C_g = (sparse.csr_array((a[k], (m.row, m.col)), m.shape) for k, m in problem.matrices.items())
        low = np.concatenate([a["b"], np.full(len(a["h"]), -np.inf)])
        x, y = osqp_solve(eps, P, a["p"], sparse.vstack([C_a, C_g]), low, np.concatenate([a["b"], a["h"]]))
        nu, lam = y[:e], y[e:]
        active = lam > 10 * eps
        C = sparse.vstack([C_a, C_g[active]])
        z, w = osqp_solve(eps, P, g.numpy(), C, np.zeros(C.shape[0]), np.zeros(C.shape[0]))
        w_g = np.zeros(len(lam))
        w_g[active] = w[e:]
        out = {"p": z, "b": -w[:e], "h": -w_g, "Q": (z[Q.row] * x[Q.col] + x[Q.row] * z[Q.col]) / 2}
        for key, M, v, dual in (("A", A, w[:e], nu), ("G", G, w_g, lam)):
            out[key] = v[M.row] * x[M.col] + dual[M.row] * z[M.col]
        for key, value in out.items():
            t[key].grad = torch.from_numpy(value)
        return torch.from_numpy(x[:n])

    return run


def limit(problem: SparseProblem) -> Callable:
    """One sparse LU of Q and one back-substitution."""
    Q = problem.matrices["Q"]

    def run(t: dict[str, Tensor], g: Tensor, _: object) -> Tensor:
        values = t["Q"].detach().numpy()
        factor = splu(sparse.csc_array((values, (Q.row, Q.col)), Q.shape))
        return torch.from_numpy(factor.solve(-t["p"].detach().numpy()))

    return run


def accuracy_table(rows: list[dict]) -> str:
    """Time and accuracy side by side: a loose answer takes less time, so OSQP is there at both accuracies."""
    table = []
    for row in rows:
        method, name = row["method"], "ours" if row["method"] == "ours (auto)" else row["method"]
        if row["case"] == "sparse" and (name != method or method == "moreau" or method.startswith("OSQP")):
            line = {"sparse, n": row["n"], "active": f"{100 * row['active']:.0f} %", "method": name}
            line |= {"ms": f"{row['ms']:.3g}", "time / ours": f"{row.get('peer/ours', 1):.2g}"}
            table.append(line | {"error of x": f"{row['x_error']:.0e}", "of gradients": f"{row['gradient_error']:.0e}"})
    return markdown(table)


def cases(quick: bool) -> Iterator[tuple[dict, list[SparseProblem], dict[str, Callable]]]:
    for n in (200,) if quick else (1000, 5000):
        for active in (0.05, 0.4):
            case = {"case": "sparse", "n": n, "batch": 1, "active": active, "shared": True}
            methods = {f"ours ({s})": partial(ours, s) for s in ("auto", "piqp", "clarabel")} | {"moreau": moreau}
            methods |= {"OSQP recipe, 1e-5": partial(recipe, 1e-5)}
            methods |= {"OSQP recipe, 1e-9 + polish": partial(recipe, 1e-9), "limit": limit}
            yield case, [chain(n, active, seed) for seed in (0, 1)], methods
