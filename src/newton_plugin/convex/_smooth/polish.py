"""From a solver's answer to a point that meets the optimality conditions to the last digits.

1. The active rows are guessed: a row is active if its multiplier, in units of the gradient, exceeds its slack, in units
   of x. The unit of the gradient is ``1 + |gradient|``, as in every tolerance here. (The gradient alone is no unit. It
   vanishes at a solution inside the constraints: what is left of it, 1e-10, is the multiplier itself. The ratio is then
   1/2, and any row with less slack would be held active.) Only if this guess leads to no solution, the unit is the
   gradient alone: a small objective has small multipliers.
2. Newton's method on the optimality conditions with these rows.
3. The conditions are checked. Where they do not hold, rows with a negative multiplier leave the active ones, violated
   rows enter, and step 2 begins again from the solver's answer.
4. Rows with slack and multiplier both zero are left out, as in ``_active_set``: the solution has a kink there, and this
   gives the one-sided derivative for changes that take x off the constraint.

Each problem of the batch is treated separately; one that is solved is not touched again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from newton_plugin.convex._smooth.program import Derivatives, Program
from newton_plugin.convex._status import Status

__all__ = ["Answer", "Polished", "polish"]

_TIGHT = 1e-9  # tolerance of the optimality conditions
_FINE = 1e-12  # tolerance of the signs by which rows change sides
_ROUNDS = 10
_AT_ONCE = 4  # rounds in which all wrong rows change sides; after them only the first, which cannot cycle


class Polished(NamedTuple):
    """B points, and how good they are."""

    u: Tensor
    """x, nu, lam: (B, n + m + k)."""
    active: Tensor
    """(B, k)."""
    inverse: Tensor
    """K^-1 with K = dF/du, (B, n + m + k, n + m + k); the pseudo-inverse where K is singular."""
    unique: Tensor
    """(B,): whether K is not singular."""
    status: Tensor
    """(B,)."""
    wrong: Tensor
    """(B, k): active rows with a negative multiplier, and others that are violated."""
    weak: Tensor
    """(B, k): active rows with a multiplier of zero."""

    def put(self, index: Tensor, part: Polished, good: Tensor) -> Polished:
        """Replace the problems at ``index`` by those of ``part``, where ``good``."""
        index = index[good]
        return Polished(*(old.index_copy(0, index, new[good]) for old, new in zip(self, part, strict=True)))


class Answer(NamedTuple):
    """A solver's answer to B problems, n variables and m equalities each."""

    program: Program
    leaves: tuple[Tensor, ...]
    dims: tuple[int | None, ...]
    sizes: tuple[int, int]
    u: Tensor
    """x, nu, lam: (B, n + m + k)."""
    slack: Tensor
    """(B, k)."""
    status: Tensor
    """(B,): a problem that is not SOLVED keeps its status."""

    def at(self, index: Tensor) -> Answer:
        leaves = tuple(leaf if dim is None else leaf[index] for leaf, dim in zip(self.leaves, self.dims, strict=True))
        return self._replace(leaves=leaves, u=self.u[index], slack=self.slack[index], status=self.status[index])


def polish(answer: Answer) -> Polished:
    """The solutions."""
    best = _search(answer, _guess(answer, 1.0))
    failed = ((best.status != 0) & (answer.status == 0)).nonzero().squeeze(-1)
    if len(failed):
        part = answer.at(failed)
        again = _search(part, _guess(part, 0.0))
        best = best.put(failed, again, again.status == 0)
    idle = ((best.status == 0) & best.weak.any(-1)).nonzero().squeeze(-1)
    if len(idle):
        rows = best.active[idle] & ~best.weak[idle]
        without = _newton(answer.at(idle)._replace(u=best.u[idle]), rows)
        # Where x would be free to move without these rows, they stay.
        best = best.put(idle, without, (without.status == 0) & (without.unique | ~best.unique[idle]))
    return best


def _guess(answer: Answer, unit: float) -> Tensor:
    """(B, k): the multiplier, in units of ``unit`` + the gradient, exceeds the slack, in units of x."""
    n, m = answer.sizes
    d = _derivatives(answer, answer.u)
    length = _norm(d.G).clamp(min=1e-300)
    force = answer.u[:, n + m :] * length
    scale = unit + _norm(d.gradient).unsqueeze(-1) + force.sum(-1, keepdim=True)
    room = answer.slack.clamp(min=0) / length / (1 + _norm(answer.u[:, :n]).unsqueeze(-1))
    return force / scale.clamp(min=1e-300) > room


def _search(answer: Answer, active: Tensor) -> Polished:
    """The solutions, beginning with these rows."""
    best = _newton(answer, active)
    for i in range(_ROUNDS):
        index = best.wrong.any(-1).nonzero().squeeze(-1)
        if not len(index):
            break
        wrong = best.wrong[index]
        if i >= _AT_ONCE:
            wrong = wrong & (wrong.cumsum(-1) == 1)
        part = _newton(answer.at(index), best.active[index] ^ wrong)
        # A wrong sign at the level of rounding is no reason to give up a solution.
        better = (part.status == 0) | (best.status[index] != 0)
        best.wrong[index[~better]] = False
        best = best.put(index, part, better)
    return best


def _newton(answer: Answer, active: Tensor) -> Polished:
    """The solutions with these rows active, checked."""
    program, sizes, leaves = answer.program, answer.sizes, answer.leaves
    first = sum(sizes)
    u = torch.cat((answer.u[:, :first], answer.u[:, first:] * active), -1)

    def residual(u: Tensor, active: Tensor, *leaves: Tensor) -> Tensor:
        return program.residual(u, leaves, active, sizes)

    d = _derivatives(answer, u)
    inverse, unique = _inverse(d, active)
    for _ in range(8):
        left = torch.vmap(residual, in_dims=(0, 0, *answer.dims))(u, active, *leaves)
        step, size = _times(inverse, left), 1 + u.abs().amax(-1)
        if bool(((left.abs().amax(-1) <= 1e-13 * size) & (step.abs().amax(-1) <= 1e-11 * size)).all()):
            break
        u = u - step
        d = _derivatives(answer, u)
        inverse, unique = _inverse(d, active)
    return _check(answer, d, Polished(u, active, inverse, unique, answer.status, active, active))


def _inverse(d: Derivatives, active: Tensor) -> tuple[Tensor, Tensor]:
    """K^-1, (B, n + m + k, n + m + k), the pseudo-inverse where K is singular; and whether K is regular."""
    n, m, k = d.P.shape[-1], d.e.shape[-1], d.g.shape[-1]
    K = d.P.new_zeros(len(d.P), n + m + k, n + m + k)
    K[:, :n, :n], K[:, :n, n : n + m], K[:, :n, n + m :] = d.P, d.E.mT, d.G.mT
    K[:, n : n + m, :n] = d.E
    K[:, n + m :, :n] = d.G * active.unsqueeze(-1)
    K.diagonal(dim1=-2, dim2=-1)[:, n + m :] = (~active).to(K.dtype)
    K = torch.where(torch.isfinite(K).all(-1).all(-1)[:, None, None], K, torch.eye(n + m + k).to(K))
    # Large second derivatives beside rows of length one would make K look singular: scale x by root(1 / P).
    unit = d.P.abs().flatten(1).amax(-1, keepdim=True).nan_to_num(1.0, 1.0).clamp(min=1.0).rsqrt()
    column = torch.cat((unit.expand(-1, n), (1 / unit).expand(-1, m + k)), -1)
    row = torch.cat((column[:, : n + m], torch.where(active, 1 / unit, unit)), -1)
    K = row.unsqueeze(-1) * K * column.unsqueeze(-2)
    values = torch.linalg.svdvals(K / K.abs().amax((-2, -1), keepdim=True).clamp(min=1e-300))
    regular = values[:, -1] > 1e-12 * values[:, 0]
    inverse = torch.linalg.inv_ex(K).inverse
    if not bool(regular.all()):
        inverse = torch.where(regular[:, None, None], inverse, torch.linalg.pinv(K, rtol=1e-12))
    return column.unsqueeze(-1) * inverse * row.unsqueeze(-2), regular


def _check(answer: Answer, d: Derivatives, found: Polished) -> Polished:
    """Set the status (optimality conditions, and convexity where it shows), the wrong rows and the weak rows."""
    n, m = answer.sizes
    u, active = found.u, found.active
    x, nu, lam = u[:, :n], u[:, n : n + m], u[:, n + m :]
    P = torch.where(torch.isfinite(d.P), d.P, 0.0)
    pull, push, own = (_times(M, v) for M, v in ((d.E.mT, nu), (d.G.mT, lam), (P, x)))
    size = 1 + torch.stack([_norm(v) for v in (d.gradient, pull, push, own)]).amax(0)
    reach = (1 + _norm(x)).unsqueeze(-1) * (1 + _norm(d.G))
    force, room = lam * _norm(d.G) / size.unsqueeze(-1), -d.g / reach  # no dimensions
    good = torch.isfinite(d.P).all(-1).all(-1) & (_norm(d.gradient + pull + push) <= _TIGHT * size)
    good &= (d.e.abs() <= _TIGHT * (1 + _norm(x)).unsqueeze(-1) * (1 + _norm(d.E))).all(-1)
    good &= ((force >= -_TIGHT) & (torch.where(active, room.abs(), -room) <= _TIGHT)).all(-1)
    status = torch.where(good, int(Status.SOLVED), int(Status.NOT_CONVERGED))
    values = torch.linalg.eigvalsh(0.5 * (P + P.mT))
    bent = values[:, 0] < -1e-8 * (1 + values.abs().amax(-1))
    status = torch.where(bent, int(Status.NON_CONVEX), status)
    known = (answer.status != 0).unsqueeze(-1)
    wrong = ~known & torch.where(active, force < -_FINE, room < -_FINE)
    status = torch.where(known.squeeze(-1), answer.status, status)
    return found._replace(status=status, wrong=wrong, weak=active & (force.abs() <= _FINE))


def _times(M: Tensor, v: Tensor) -> Tensor:
    return (M @ v.unsqueeze(-1)).squeeze(-1)


def _derivatives(answer: Answer, u: Tensor) -> Derivatives:
    n, m = answer.sizes
    return answer.program.derivatives(u[:, :n], u[:, n : n + m], u[:, n + m :], answer.leaves, answer.dims)


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=-1)
