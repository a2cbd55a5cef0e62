r"""Block principal pivoting: the active sets of many strictly convex QPs at once.

Eliminate x from the optimality conditions, ``x = -Q^-1 (p + C'y)``. A complementarity problem in the multipliers y and
the slacks ``s = c - C x`` is left::

    s = s0 + S y      S = C Q^-1 C' = V'V,  V = L^-1 C'      s >= 0,  y >= 0,  s_i y_i = 0

(equalities: s = 0, y free). Guess the set F of rows that are active and solve ``S_FF y_F = -s0_F``. Rows of F
with y < 0 leave it, other rows with s < 0 enter it, *many at once*; repeat. F starts with the equalities alone. Of the
violated rows only those enter that are violated by at least 0.3 of the worst: measured, with all of them F grows to
nearly every row, costs more, and is often dependent. Some ten rounds are usually enough. This goes on while the number
of wrong rows falls. After three rounds in which it did not, only the last wrong row moves (Murty), which is finite.
Problems whose S_FF becomes singular, or that take too long, are left to the dual active-set method (``dual.py``), which
is finite without conditions.

Sources: Judice and Pires, "A block principal pivoting algorithm for large-scale strictly monotone linear
complementarity problems", Computers & Operations Research 1994; Kim and Park, SIAM J. Sci. Comput. 2011 (the
exchange rule).

Only rows that were ever guessed active need a column of V and of S: the *pool*, which grows as needed (its width
in steps of 24, see ``_system/products.py``). If a batch shares Q and C, or for one problem with few rows, V and S
are computed for all rows at once instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from newton_plugin.convex._active_set.gram import Gram, PooledGram, SharedGram
from newton_plugin.convex._active_set.judge import Scale
from newton_plugin.convex._system.problem import Problem
from newton_plugin.convex._system.products import times
from newton_plugin.convex._system.units import size_in

__all__ = ["Pivoted", "pivot"]

_ROUNDS = 40


class Pivoted(NamedTuple):
    """What pivoting found; ``found`` is false where it gave up."""

    found: Tensor
    """(B,)."""
    rows: Tensor
    """(B, f), as in Factors."""
    present: Tensor
    schur: Tensor


def pivot(problem: Problem, cholesky: Tensor, scale: Scale) -> Pivoted:
    """The active rows of each problem, Q = L L' given."""
    x0 = scale.minimiser
    slack = problem.c - times(problem.C, x0)
    tolerance, length = scale.tolerance, scale.length
    batch, count = slack.shape
    if problem.C.ndim == 2 and cholesky.ndim == 2 and (batch > 1 or count <= 3 * problem.p.shape[1]):
        gram: Gram = SharedGram(problem, cholesky, slack)
    else:
        gram = PooledGram(problem, cholesky, slack)
    equality = problem.is_equality
    threshold = tolerance * (problem.c.abs() + length * size_in(scale.unit, x0))
    unit = 1.0 / length.clamp(min=1e-300)
    if problem.m:
        active = equality.expand(batch, -1).clone()
    else:
        active = _worst(slack < -threshold, slack * unit)
    found = torch.zeros(batch, dtype=torch.bool, device=slack.device)
    given_up = torch.zeros_like(found)
    fewest = torch.full((batch,), slack.shape[1] + 1, device=slack.device)
    patience = torch.full_like(fewest, 3)
    order = torch.arange(slack.shape[1], device=slack.device)
    live: Tensor | None = None  # None: all
    for _ in range(_ROUNDS):
        now = active if live is None else active[live]
        y, s, size, ok = gram.solve(live, now)
        gradient = scale.start if live is None else scale.start[live]
        limit = threshold if live is None else threshold[live]
        weighted = y * size
        gradient = torch.maximum(gradient, weighted.abs().amax(-1, keepdim=True))
        bound = -(tolerance if live is None else tolerance[live]) * gradient
        leave = now & ~equality & (weighted < bound)
        enter = ~now & (s < -limit)
        wrong = leave | enter
        count = wrong.sum(-1)
        done = ok & (count == 0)
        lost = ~ok | ~torch.isfinite(gradient.squeeze(-1))
        if bool(done.any()):
            gram.keep(live, done)
        here = slice(None) if live is None else live
        found[here] |= done
        given_up[here] |= lost
        stop = done | lost
        if bool(stop.all()):
            break
        best = fewest[here]
        better = count < best
        left = torch.where(better, 3, patience[here] - 1)
        fewest[here], patience[here] = torch.minimum(best, count), left
        last = torch.where(wrong, order, -1).amax(-1, keepdim=True)
        scaled = s * (unit if live is None or unit.ndim == 1 else unit[live])
        flip = torch.where((left >= 0).unsqueeze(-1), leave | _worst(enter, scaled), wrong & (order == last))
        active[here] = now ^ (flip & ~stop.unsqueeze(-1))
        if bool(stop.any()):
            live = (~(found | given_up)).nonzero().squeeze(-1)
    return Pivoted(found, *gram.factor())


def _worst(violated: Tensor, slack: Tensor) -> Tensor:
    """The violated rows (b, K) that are violated by at least 0.3 of the worst."""
    depth = torch.where(violated, -slack, 0.0)
    return violated & (depth >= 0.3 * depth.amax(-1, keepdim=True))
