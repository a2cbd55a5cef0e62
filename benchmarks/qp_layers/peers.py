"""The differentiable QP layers of ``qp_layers``, each behind one signature: leaves Q, p, A, b, G, h -> x.

Each maker receives the problem's shapes and returns the function that is timed. What a user builds once for all
training steps (a cvxpy problem, moreau's solver object) is made here and its time is reported apart, in favour of the
peer; what depends on the numbers (factorisation, scaling, OSQP's setup) happens in the timed call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from benchmarks.qp_layers.problems import NAMES, Problem
from torch import Tensor

Layer = Callable[[dict[str, Tensor]], Tensor]


def ours(problem: Problem, **options: Any) -> Layer:
    from newton_plugin.convex import solve_qp

    return lambda t: solve_qp(*(t[k] for k in NAMES), **options).x


def qpth(problem: Problem) -> Layer:
    """Its own defaults: eps 1e-12, at most 20 interior-point iterations."""
    from qpth.qp import QPFunction

    return lambda t: QPFunction(verbose=-1)(*(t[k] for k in ("Q", "p", "G", "h", "A", "b")))


def qplayer(problem: Problem, eps_backward: float = 1e-4) -> Layer:
    """proxsuite's QPLayer at its defaults (eps 1e-9), one thread."""
    from proxsuite.torch.qplayer import QPFunction

    def layer(t: dict[str, Tensor]) -> Tensor:
        below = torch.full_like(t["h"], -1e20)
        f = QPFunction(eps_backward=eps_backward, omp_parallel=False)
        return f(*(t[k] for k in ("Q", "p", "A", "b", "G")), below, t["h"])[0]

    return layer


def cvxpylayers(problem: Problem, solver: str | None = None) -> Layer:
    """The default solver (diffcp) takes no parametric Q: it receives the Cholesky factor, as its users do.

    ``solver="MOREAU"`` takes Q itself.
    """
    import cvxpy as cp
    from cvxpylayers.torch import CvxpyLayer

    n = problem.x.shape[-1]
    parameters = {k: cp.Parameter(v.shape[-1:] if k in "pbh" else v.shape[-2:]) for k, v in problem.arrays.items()}
    x = cp.Variable(n)
    if solver:
        parameters["Q"] = cp.Parameter((n, n), PSD=True)
        quadratic = cp.quad_form(x, parameters["Q"])
    else:
        quadratic = cp.sum_squares(parameters["Q"] @ x)
    constraints = [parameters["A"] @ x == parameters["b"], parameters["G"] @ x <= parameters["h"]]
    program = cp.Problem(cp.Minimize(quadratic / 2 + parameters["p"] @ x), constraints)
    layer = CvxpyLayer(program, [parameters[k] for k in NAMES], [x], solver=solver)

    def call(t: dict[str, Tensor]) -> Tensor:
        Q = t["Q"] if solver else torch.linalg.cholesky(t["Q"]).mT
        return layer(Q, *(t[k] for k in NAMES[1:]))[0]

    return call


def moreau(problem: Problem, solver: str = "auto") -> Layer:
    """Dense patterns; its solver object is built once, its numbers change from call to call.

    At its default of 200 iterations the active set that ``auto`` chooses gives up at n = 500 (status MaxIterations,
    no error): it may take 10,000 here.
    """
    import moreau
    from moreau.torch import Solver

    n, e, m = problem.x.shape[-1], problem.nu.shape[-1], problem.lam.shape[-1]

    def dense(rows: int) -> tuple[Tensor, Tensor]:
        return torch.arange(0, (rows + 1) * n, n), torch.arange(n).repeat(rows)

    options: dict[str, Any] = {"max_iter": 10000, "enable_grad": True, "batch_size": len(problem.x)}
    settings = moreau.Settings(device="cpu", solver=solver, **options)
    built = Solver(n, e + m, *dense(n), *dense(e + m), moreau.Cones(num_zero_cones=e, num_nonneg_cones=m), settings)

    def layer(t: dict[str, Tensor]) -> Tensor:
        C, d = torch.cat([t["A"], t["G"]], -2), torch.cat([t["b"], t["h"]], -1)
        return built.solve(t["Q"].flatten(-2), C.flatten(-2), t["p"], d).x

    return layer


class _Recipe(torch.autograd.Function):
    """BPQP as published: OSQP solves the program, and OSQP solves the equality-constrained one of the backward pass.

    The published code stops at 1e-5 and takes multipliers above 1e-4 as active; ``eps`` smaller than that turns
    OSQP's polishing on and lowers the threshold alike.
    """

    @staticmethod
    def forward(ctx: Any, eps: float, *tensors: Tensor) -> Tensor:
        Q, p, A, b, G, h = (t.detach().numpy() for t in tensors)
        solutions = []
        for i in range(len(p)):
            Qi, Ai, Gi = (M if M.ndim == 2 else M[i] for M in (Q, A, G))
            low = np.concatenate([b[i], np.full(len(h[i]), -np.inf)])
            solutions.append(osqp_solve(eps, Qi, p[i], np.concatenate([Ai, Gi]), low, np.concatenate([b[i], h[i]])))
        x, y = (np.stack(v) for v in zip(*solutions, strict=True))
        ctx.save_for_backward(*tensors)
        ctx.eps, ctx.x, ctx.y = eps, x, y
        return torch.from_numpy(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        Q, p, A, b, G, h = (t.detach().numpy() for t in ctx.saved_tensors)
        total = [np.zeros_like(v) for v in (Q, p, A, b, G, h)]
        for i in range(len(p)):
            Qi, Ai, Gi = (M if M.ndim == 2 else M[i] for M in (Q, A, G))
            e, x, y = len(Ai), ctx.x[i], ctx.y[i]
            nu, lam = y[:e], y[e:]
            active = lam > 10 * ctx.eps
            C = np.concatenate([Ai, Gi[active]])
            z, w = osqp_solve(ctx.eps, Qi, g[i].numpy(), C, np.zeros(len(C)), np.zeros(len(C)))
            w_g = np.zeros(len(Gi))
            w_g[active] = w[e:]
            outer = np.outer(z, x)
            one = ((outer + outer.T) / 2, z, np.outer(w[:e], x) + np.outer(nu, z), -w[:e])
            one = (*one, np.outer(w_g, x) + np.outer(lam, z), -w_g)
            for sum_, value in zip(total, one, strict=True):
                if sum_.shape == value.shape:
                    sum_ += value
                else:
                    sum_[i] = value
        return None, *(torch.from_numpy(v) for v in total)


def osqp_solve(eps: float, *data: Any) -> tuple[np.ndarray, np.ndarray]:
    import osqp
    from scipy import sparse

    Q, p, C, low, high = data
    solver = osqp.OSQP()
    options: dict[str, Any] = {"eps_abs": eps, "eps_rel": eps, "max_iter": 100000, "polishing": eps < 1e-5}
    solver.setup(sparse.csc_matrix(Q), p, sparse.csc_matrix(C), low, high, verbose=False, **options)
    result = solver.solve(raise_error=False)
    return result.x, result.y


def recipe(problem: Problem, eps: float = 1e-5) -> Layer:
    return lambda t: _Recipe.apply(eps, *(t[k] for k in NAMES))
