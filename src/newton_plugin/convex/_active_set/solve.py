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
from newton_plugin.convex._system.problem import LEAST_TOLERANCE, Problem, condition, finite, own, zero_tolerance
from newton_plugin.convex._system.products import times, times_transposed
from newton_plugin.convex._system.rows import compress
from newton_plugin.convex._system.units import equilibrate

__all__ = ["Solved", "solve_active_set"]

_ILL_CONDITIONED = 1e3
_LARGE = 200  # variables
# How far the weight of the proximal term falls. Small ones need fewer steps. They also put the minimiser without
# constraints far away, and what is left of it after the constraints is rounding: then a larger one is tried.
_LEAST, _LEAST_AGAIN = 1e-5, (1e-3, 1e-2, 1e-1)
_ROUNDED_ZERO = 64 * 2.0**-52
_SINGULAR = 1e-9  # of the optimality conditions, where Q is singular


def solve_active_set(
    problem: Problem, refine: bool | str = "auto", claim: Tensor | None = None, precision: float = 2.0**-52
) -> Solved:
    """Solve B problems; ``claim``: active rows (B, K) that another solver found.

    ``precision``: the rounding error of the caller's dtype. Rows that are dependent up to it count as dependent, and
    may contradict each other by as much.
    """
    if problem.Q.ndim == 2 or problem.C.ndim == 2 or problem.p.shape[1] <= _LARGE or problem.p.device.type != "cpu":
        return _solve(problem, refine, claim, precision)
    # A batch of large problems with matrices of their own does not fit into the caches: solve one after the other.
    parts = [
        _solve(
            problem._replace(Q=problem.Q[i], p=problem.p[i : i + 1], C=problem.C[i], c=problem.c[i : i + 1]),
            refine,
            None if claim is None else claim[i : i + 1],
            precision,
        )
        for i in range(problem.batch)
    ]
    fields = [torch.cat(values) for values in zip(*(part[:5] for part in parts), strict=True)]
    return Solved(*fields, stack([part.factors for part in parts]))  # type: ignore[arg-type]


def _solve(problem: Problem, refine: bool | str, claim: Tensor | None, precision: float) -> Solved:
    batch = problem.batch
    cholesky, definite = _factor_objective(problem)
    refined = _refined(cholesky, refine, batch)
    adaptive = refine == "auto"
    if bool(definite.all()):
        solved = solve_definite(problem, cholesky, refined, claim, adaptive, precision)
        return _solve_nearly_singular(problem, cholesky, solved, precision)
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
        part, factor = problem.at(good), own(cholesky, good)
        solved = solve_definite(part, factor, refined[good], start, adaptive, precision)
        solved = _solve_nearly_singular(part, factor, solved, precision)
        out = _put(out, good, solved)
    out.status[bad] = _diagnose(problem, bad)
    singular = bad[out.status[bad] == 0]
    if len(singular):
        out = _put(out, singular, _solve_singular(problem.at(singular), own(cholesky, singular), precision))
    return out


def _put(out: Solved, index: Tensor, part: Solved) -> Solved:
    for old, new in zip(out[:5], part[:5], strict=True):
        old[index] = new
    return out._replace(factors=put(out.factors, index, part.factors))


def _solve_nearly_singular(problem: Problem, cholesky: Tensor, solved: Solved, precision: float) -> Solved:
    """What failed although Q has passed for definite, in poor condition: solved again as if Q were singular.

    A pivot of Q may be nothing but rounding. And the minimiser without constraints, from which the search starts, is
    far away then.
    """
    tolerance = zero_tolerance(cholesky, problem.batch).squeeze(-1)
    doubtful = (solved.status != 0) & (solved.status != Status.NOT_FINITE) & (tolerance > LEAST_TOLERANCE)
    index = doubtful.nonzero().squeeze(-1)
    if not len(index):
        return solved
    part = _solve_singular(problem.at(index), own(cholesky, index), precision)
    solved.status[index] = part.status
    better = (part.status == 0).nonzero().squeeze(-1)
    if len(better):
        part = Solved(*(t[better] for t in part[:5]), factors=part.factors.at(better))  # type: ignore[misc]
        solved = _put(solved, index[better], part)
    return solved


def _solve_singular(problem: Problem, cholesky: Tensor, precision: float) -> Solved:
    batch, n = problem.p.shape
    problem = problem._replace(Q=problem.Q.expand(batch, n, n), C=problem.C.expand(batch, *problem.C.shape[-2:]))
    solved = _by_proximal_point(problem, cholesky, precision, _LEAST)
    for least in _LEAST_AGAIN:
        index = (solved.status == int(Status.NOT_CONVERGED)).nonzero().squeeze(-1)
        if not len(index):
            break
        part = _by_proximal_point(problem.at(index), own(cholesky, index), precision, least)
        solved = _put(solved, index, part)
    return solved


def _by_proximal_point(problem: Problem, cholesky: Tensor, precision: float, least: float) -> Solved:
    batch = problem.batch
    scaled, columns, rows = equilibrate(problem)
    x, y, status, active, inverse, unique, reach = proximal(scaled, precision=precision, least=least)
    tried = (status == int(Status.SOLVED)) | (status == int(Status.NOT_CONVERGED))
    good = optimal(scaled, x, y, reach, precision)
    status = torch.where(tried, torch.where(good, int(Status.SOLVED), int(Status.NOT_CONVERGED)), status)
    index, present = compress(active)
    eye = torch.eye(index.shape[1], dtype=x.dtype, device=x.device).repeat(batch, 1, 1)
    everywhere = torch.ones_like(unique)
    both = torch.cat((columns, rows.gather(1, index)), -1)
    inverse = inverse * both.unsqueeze(-1) * both.unsqueeze(-2)
    factors = Factors(cholesky, index, present, eye, inverse, everywhere, everywhere.long())
    return Solved(x * columns, y * rows, status, active, unique | (status != 0), factors)


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
    symmetric = 0.5 * (Q + Q.mT)
    scale = Q.abs().amax(-1)
    scale = torch.where(scale > 0, scale, 1.0).rsqrt()
    values = torch.linalg.eigvalsh(symmetric)
    in_units = torch.linalg.eigvalsh(symmetric * scale.unsqueeze(-1) * scale.unsqueeze(-2))
    greatest = values.abs().amax(-1)
    # A small negative eigenvalue may be large in the units of its variables, or the rounding of zero.
    negative = (in_units[..., 0] < -1e-10 * in_units.abs().amax(-1)) & (values[..., 0] < -_ROUNDED_ZERO * greatest)
    negative |= values[..., 0] < -1e-10 * greatest
    return torch.where((status == 0) & negative, int(Status.NON_CONVEX), status)


def optimal(problem: Problem, x: Tensor, y: Tensor, reach: Tensor, precision: float) -> Tensor:
    """(B,): whether x and y meet the optimality conditions, entry by entry relative to the terms of each.

    ``reach`` (B,): a size of x that the data give, so that x may be zero.
    """
    tolerance = max(_SINGULAR, 8 * precision)
    length = torch.linalg.vector_norm(problem.C, dim=-1)
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-4 * reach.unsqueeze(-1)
    slack = problem.c - times(problem.C, x)
    terms = problem.c.abs() + times(problem.C.abs(), x.abs()) + 1e-3 * length * size
    equality = problem.is_equality
    feasible = torch.where(equality | (y != 0), slack.abs(), -slack) <= tolerance * terms
    Qx, Cy = 0.5 * (times(problem.Q, x) + times_transposed(problem.Q, x)), times_transposed(problem.C, y)
    parts = torch.stack([problem.p.abs(), times(problem.Q.abs(), x.abs()), times_transposed(problem.C.abs(), y.abs())])
    gradient = torch.linalg.vector_norm(parts, dim=-1, keepdim=True).amax(0)
    stationary = (Qx + Cy + problem.p).abs() <= tolerance * (parts.sum(0) + 1e-3 * gradient)
    signs = equality | (y * length >= -tolerance * gradient)
    return (feasible & signs).all(-1) & stationary.all(-1) & torch.isfinite(gradient).squeeze(-1)
