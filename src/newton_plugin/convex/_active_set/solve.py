"""From a batch of QPs to solutions with factored optimality systems: the built-in solver, and the check of others.

1. Cholesky factorisation of Q. Where it fails, Q is not finite, not convex, or singular (``proximal.py``).
2. The active set by block principal pivoting (``pivoting.py``), or as another solver claims it.
3. x and the multipliers from the optimality system at that set, refined against Q and C.
4. The optimality conditions are checked: every slack and every multiplier. Problems that fail are solved again by the
   dual active-set method (``dual.py``), which also proves infeasibility.

So the exact answer does not depend on who found the active set, and a wrong claim is detected.

**Weakly active rows** (slack and multiplier both zero) are left out of the system. The solution is not
differentiable there. Leaving them out gives the one-sided derivative for changes that take x off the constraint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin.convex._active_set.definite import Solved, solve_definite
from newton_plugin.convex._active_set.proximal import proximal
from newton_plugin.convex._status import Status
from newton_plugin.convex._system.factors import Factors, no_factors, put, stack
from newton_plugin.convex._system.problem import Problem, condition, finite, own
from newton_plugin.convex._system.products import times, times_transposed
from newton_plugin.convex._system.rows import compress

__all__ = ["Solved", "solve_active_set"]

_ILL_CONDITIONED = 1e3
_LARGE = 200  # variables


def solve_active_set(problem: Problem, refine: bool | str = "auto", claim: Tensor | None = None) -> Solved:
    """Solve B problems; ``claim``: active rows (B, K) that another solver found."""
    if problem.Q.ndim == 2 or problem.C.ndim == 2 or problem.p.shape[1] <= _LARGE or problem.p.device.type != "cpu":
        return _solve(problem, refine, claim)
    # A batch of large problems with matrices of their own does not fit into the caches: solve one after the other.
    parts = [
        _solve(
            problem._replace(Q=problem.Q[i], p=problem.p[i : i + 1], C=problem.C[i], c=problem.c[i : i + 1]),
            refine,
            None if claim is None else claim[i : i + 1],
        )
        for i in range(problem.batch)
    ]
    fields = [torch.cat(values) for values in zip(*(part[:5] for part in parts), strict=True)]
    return Solved(*fields, stack([part.factors for part in parts]))  # type: ignore[arg-type]


def _solve(problem: Problem, refine: bool | str, claim: Tensor | None) -> Solved:
    batch = problem.batch
    cholesky, definite = _factor_objective(problem)
    refined = _refined(cholesky, refine, batch)
    adaptive = refine == "auto"
    if bool(definite.all()):
        return solve_definite(problem, cholesky, refined, claim, adaptive)
    definite = definite.expand(batch)
    device = problem.p.device
    out = Solved(
        torch.full_like(problem.p, torch.nan),
        torch.full_like(problem.c, torch.nan),
        torch.zeros(batch, dtype=torch.long, device=device),
        torch.zeros_like(problem.c, dtype=torch.bool),
        torch.ones(batch, dtype=torch.bool, device=device),
        no_factors(cholesky, batch),
    )
    good, bad = definite.nonzero().squeeze(-1), (~definite).nonzero().squeeze(-1)
    if len(good):
        start = None if claim is None else claim[good]
        solved = solve_definite(problem.at(good), own(cholesky, good), refined[good], start, adaptive)
        out = _put(out, good, solved)
    out.status[bad] = _diagnose(problem, bad)
    singular = bad[out.status[bad] == 0]
    if len(singular):
        out = _put(out, singular, _solve_singular(problem.at(singular), own(cholesky, singular)))
    return out


def _put(out: Solved, index: Tensor, part: Solved) -> Solved:
    for old, new in zip(out[:5], part[:5], strict=True):
        old[index] = new
    return out._replace(factors=put(out.factors, index, part.factors))


def _solve_singular(problem: Problem, cholesky: Tensor) -> Solved:
    batch, n = problem.p.shape
    problem = problem._replace(Q=problem.Q.expand(batch, n, n))
    x, y, status, active, inverse, unique = proximal(problem)
    status = torch.where((status == 0) & ~optimal(problem, x, y), int(Status.NOT_CONVERGED), status)
    index, present = compress(active)
    eye = torch.eye(index.shape[1], dtype=x.dtype, device=x.device).repeat(batch, 1, 1)
    everywhere = torch.ones_like(unique)
    factors = Factors(cholesky, index, present, eye, inverse, everywhere, everywhere.long())
    return Solved(x, y, status, active, unique | (status != 0), factors)


def _factor_objective(problem: Problem) -> tuple[Tensor, Tensor]:
    """L of Q (the identity where Q is not safely definite), and where Q is definite: () or (B,)."""
    Q = problem.Q
    symmetric = Q if torch.equal(Q, Q.mT) else 0.5 * (Q + Q.mT)
    factor, info = torch.linalg.cholesky_ex(symmetric)
    diagonal = Q.diagonal(dim1=-2, dim2=-1)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    definite = (info == 0) & (pivots > 1e-14 * Q.shape[-1] * diagonal).all(-1)
    if bool(definite.all()):
        return factor, definite
    eye = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    return torch.where(definite[..., None, None], factor, eye), definite


def _refined(cholesky: Tensor, refine: bool | str, batch: int) -> Tensor:
    """(B,): steps of iterative refinement to begin with; ``definite.py`` adds more where residuals ask for it."""
    if refine == "auto":
        return (condition(cholesky) > _ILL_CONDITIONED).long().expand(batch).clone()
    return torch.full((batch,), int(bool(refine)), device=cholesky.device)


def _diagnose(problem: Problem, index: Tensor) -> Tensor:
    """Status of problems whose Q has no Cholesky factor; SOLVED stands for "positive semi-definite"."""
    sub = problem.at(index)
    status = torch.where(finite(sub), int(Status.SOLVED), int(Status.NOT_FINITE))
    Q = sub.Q if torch.isfinite(sub.Q).all() else torch.nan_to_num(sub.Q, 0.0, 0.0, 0.0)
    values = torch.linalg.eigvalsh(0.5 * (Q + Q.mT))
    negative = values[..., 0] < -1e-10 * values.abs().amax(-1)
    return torch.where((status == 0) & negative, int(Status.NON_CONVEX), status)


def optimal(problem: Problem, x: Tensor, y: Tensor, tolerance: float = 1e-7) -> Tensor:
    """(B,): whether x and y meet the optimality conditions, each relative to its terms."""
    length = torch.linalg.vector_norm(problem.C, dim=-1)
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    slack = problem.c - times(problem.C, x)
    allowed = tolerance * (problem.c.abs() + length * size)
    equality = problem.is_equality
    feasible = torch.where(equality, slack.abs(), -slack) <= allowed
    Qx, Cy = 0.5 * (times(problem.Q, x) + times_transposed(problem.Q, x)), times_transposed(problem.C, y)
    terms = torch.stack([torch.linalg.vector_norm(t, dim=-1) for t in (Qx, Cy, problem.p)]).amax(0)
    stationary = torch.linalg.vector_norm(Qx + Cy + problem.p, dim=-1) <= tolerance * terms
    signs = equality | (y * length >= -tolerance * terms.unsqueeze(-1))
    complementary = equality | (y == 0) | (slack <= allowed)
    return (feasible & signs & complementary).all(-1) & stationary & torch.isfinite(terms)
