r"""Programs whose Q is singular (linear programs among them): the proximal-point method around the exact solver.

    x_(k+1) = argmin 1/2 x'Qx + p'x + sigma/2 |x - x_k|^2     subject to the same constraints

Each step is a strictly convex QP, which ``dual.py`` solves exactly. On a linear program the sequence ends after
finitely many steps; on a quadratic program it stops when x no longer moves. Only the *active set* at its end is used:
x and the multipliers are then computed from the optimality system.

If a program has no minimum, the steps do not die out. Their limit v = x_(k+1) - x_k is a direction with Qv = 0,
Av = 0, Gv <= 0 and p'v < 0, which proves it.

Sources: Rockafellar, SIAM J. Control Optim. 1976 (the method), Ferris, Math. Programming 1991 (it is finite on
linear programs); Banjac et al., J. Optim. Theory Appl. 2019 (the limit of the steps).
"""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin.convex._active_set.dual import dual_active_set
from newton_plugin.convex._status import Status
from newton_plugin.convex._system.factors import factor_rows, pseudo_inverse
from newton_plugin.convex._system.kkt import kkt_apply
from newton_plugin.convex._system.problem import Problem, zero_tolerance
from newton_plugin.convex._system.products import cholesky_apply, times, times_transposed
from newton_plugin.convex._system.rows import compress, take_rows

__all__ = ["proximal"]

_STEPS = 60


def proximal(problem: Problem, refined: int = 2, *, precision: float, least: float) -> tuple[Tensor, ...]:
    """B problems with their own Q (B, n, n), positive semi-definite; ``least``: how far sigma falls.

    Returns x (B, n), y (B, K), status (B,), active rows (B, K), the pseudo-inverses of the optimality systems
    (B, n + f, n + f) at ``compress(active)`` (also where it did not converge, so that the rows can be tried), whether
    the minimiser is unique (B,), and a size of x by the data (B,).
    """
    batch, n = problem.p.shape
    Q, p = problem.Q, problem.p
    length = torch.linalg.vector_norm(problem.C, dim=-1)
    reach = torch.where(length > 0, problem.c.abs() / length.clamp(min=1e-300), 0.0)
    reach = torch.where(reach < 1e100, reach, 0.0)
    reach = reach.amax(-1) if reach.shape[-1] else reach.new_zeros(batch)
    reach = torch.where(reach > 0, reach, 1.0)
    size = Q.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
    sigma = torch.maximum(1e-3 * size, 0.1 * p.abs().amax(-1) / reach)
    sigma = torch.where(sigma > 0, sigma, 1.0)
    floor = least * sigma
    status = torch.full((batch,), int(Status.NOT_CONVERGED), device=p.device)
    active = torch.zeros_like(problem.c, dtype=torch.bool)
    x, y = torch.zeros_like(p), torch.zeros_like(problem.c)
    live = torch.arange(batch, device=p.device)
    eye = torch.eye(n, dtype=p.dtype, device=p.device)
    for _ in range(_STEPS):
        now = problem.at(live)
        s = sigma[live]
        shifted = 0.5 * (now.Q + now.Q.mT) + s[:, None, None] * eye
        factor = torch.linalg.cholesky_ex(shifted).L
        step_problem = now._replace(Q=shifted, p=now.p - s.unsqueeze(-1) * x[live])
        rows, outcome = dual_active_set(step_problem, factor, zero_tolerance(factor, len(live)), precision)
        factors = factor_rows(step_problem, factor, rows, torch.ones_like(live), precision)
        right = -step_problem.p.unsqueeze(-1), step_problem.c.unsqueeze(-1)
        new_x, new_y = (u.squeeze(-1) for u in kkt_apply(shifted, now.C, *right, factors))
        change = new_x - x[live]
        moved = torch.linalg.vector_norm(change, dim=-1)
        far = torch.linalg.vector_norm(new_x, dim=-1)
        settled = moved <= 1e-9 * far.clamp(min=1e-300) + 1e-14 * reach[live]
        # Where the step's own minimiser without constraints is far away, x moves by its rounding for ever.
        start = torch.linalg.vector_norm(cholesky_apply(factor, step_problem.p), dim=-1)
        settled |= (rows == active[live]).all(-1) & (moved <= 1e-14 * start)
        settled &= outcome == 0
        endless = (outcome == 0) & ~settled & _is_ray(now, change)
        x[live], y[live], active[live] = new_x, new_y, rows
        outcome = torch.where(outcome == 0, int(Status.NOT_CONVERGED), outcome)
        outcome = torch.where(settled, int(Status.SOLVED), outcome)
        outcome = torch.where(endless, int(Status.UNBOUNDED), outcome)
        status[live] = outcome
        sigma[live] = torch.maximum(0.3 * s, floor[live])
        live = live[outcome == int(Status.NOT_CONVERGED)]
        if not len(live):
            break
    active &= problem.is_equality | (y > 0)
    index, present = compress(active)
    rows = take_rows(problem.C, index)
    usable = ((status == int(Status.SOLVED)) | (status == int(Status.NOT_CONVERGED)))[:, None, None]
    inverse, unique = pseudo_inverse(torch.where(usable, Q, eye), torch.where(usable, rows, 0.0), present)
    y = torch.where(active, y, 0.0)
    for _ in range(refined):
        rx = -p - 0.5 * (times(Q, x) + times_transposed(Q, x)) - times_transposed(problem.C, y)
        ry = torch.where(present, (problem.c - times(problem.C, x)).gather(1, index), 0.0)
        u = (inverse @ torch.cat((rx, ry), 1).unsqueeze(-1)).squeeze(-1)
        x = x + u[:, :n]
        y = y.scatter_add(1, index, torch.where(present, u[:, n:], 0.0))
    return x, y, status, active, inverse, unique, reach


def _is_ray(problem: Problem, v: Tensor, tolerance: float = 1e-8) -> Tensor:
    """Whether v is a direction along which the objective falls without end."""
    size = torch.linalg.vector_norm(v, dim=-1)
    safe = v / size.clamp(min=1e-300).unsqueeze(-1)
    flat = torch.linalg.vector_norm(times(problem.Q, safe), dim=-1) <= tolerance * problem.Q.abs().amax((-2, -1))
    along = times(problem.C, safe) / torch.linalg.vector_norm(problem.C, dim=-1).clamp(min=1e-300)
    along = torch.where(problem.is_equality, along.abs(), along)
    along = torch.where(problem.c < 1e100, along, -1.0)  # h = inf is no bound
    inside = (along <= tolerance).all(-1)
    slope = (problem.p * safe).sum(-1)
    return flat & inside & (slope < -tolerance * torch.linalg.vector_norm(problem.p, dim=-1)) & (size > 0)
