r"""A primal-dual interior-point method for a batch of smooth convex programs.

With slacks s > 0 and g(x) + s = 0, Newton's method solves the optimality conditions in which the products lam_i s_i are
set to mu; mu goes to zero as these conditions come to hold. Each round eliminates the slacks and solves

    [ P + G' diag(lam/s) G   E' ] [ dx  ]
    [ E                      0  ] [ dnu ]  =  right-hand side.

The step stops short of the boundary. It is halved until the merit function ``f - mu sum log s + rho |(e, g + s)|_1``
falls, of which it is a descent direction. No feasible start is needed. Each problem of the batch has its own mu, rho
and step length. The objective is divided by the size of its derivatives at the start, because mu, rho and the tolerance
are numbers that suit an objective of size 1.

Source: Nocedal and Wright, Numerical Optimization, second edition, algorithm 19.2.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from newton_plugin.convex._smooth.program import Derivatives, Program
from newton_plugin.convex._status import Status

__all__ = ["Point", "interior_point"]


_DIVERGED = 1e10


class Point(NamedTuple):
    """x (B, n), nu (B, m), lam (B, k), slack (B, k)."""

    x: Tensor
    nu: Tensor
    lam: Tensor
    slack: Tensor


def interior_point(
    program: Program,
    start: Tensor,
    leaves: tuple[Tensor, ...],
    dims: tuple[int | None, ...],
    tolerance: float = 1e-9,
    rounds: int = 100,
) -> tuple[Point, Tensor]:
    """The solution from ``start`` (B, n), accurate to about ``tolerance``, and a status (B,)."""
    _, e, g = program.values(start, leaves, dims)
    first = program.derivatives(start, torch.zeros_like(e), torch.zeros_like(g), leaves, dims)
    unit = torch.maximum(_norm(first.gradient), first.P.abs().amax((-2, -1))).unsqueeze(-1)
    unit = torch.where(torch.isfinite(unit) & (unit > 0), unit, 1.0)

    def derivatives(point: Point) -> Derivatives:
        d = program.derivatives(point.x, unit * point.nu, unit * point.lam, leaves, dims)
        f, P = d.f / unit.squeeze(-1), d.P / unit.unsqueeze(-1)
        return dataclasses.replace(d, f=f, gradient=d.gradient / unit, P=P)

    ones = torch.ones_like(g)
    point = Point(start, torch.zeros_like(e), ones, torch.maximum(-g, ones))
    mu = torch.ones_like(start[:, :1])
    rho = torch.ones_like(mu)
    least = 0.1 * tolerance
    for _ in range(rounds):
        d = derivatives(point)
        done = (_error(d, point, torch.zeros_like(mu)) <= tolerance).squeeze(-1)
        done |= ~(_norm(torch.cat((point.x, point.nu, point.lam), -1)) <= _DIVERGED)  # or NaN
        if bool(done.all()):
            break
        for _ in range(3):
            central = _error(d, point, mu) <= 10 * mu
            mu = torch.where(central, torch.minimum(0.2 * mu, mu**1.5).clamp(min=least), mu)
        step = _direction(d, point, mu)
        moved = torch.cat((point.nu + step.nu, point.lam + step.lam), -1).abs()
        if moved.shape[-1]:
            rho = torch.maximum(rho, 1.1 * moved.amax(-1, keepdim=True))
        off = _norm1(d.e) + _norm1(d.g + point.slack)
        slope = (d.gradient * step.x).sum(-1, keepdim=True) - (mu * step.slack / point.slack).sum(-1, keepdim=True)
        slope = (slope - rho * off).clamp(max=0.0)
        base = d.f.unsqueeze(-1) - mu * point.slack.log().sum(-1, keepdim=True) + rho * off
        length = _largest(point.slack, step.slack) * (~done).unsqueeze(-1)
        x, slack = point.x, point.slack
        for _ in range(40):
            x, slack = point.x + length * step.x, point.slack + length * step.slack
            f, e, g = program.values(x, leaves, dims)
            merit = (
                f.unsqueeze(-1) / unit - mu * slack.log().sum(-1, keepdim=True) + rho * (_norm1(e) + _norm1(g + slack))
            )
            worse = ~(merit <= base + 1e-4 * length * slope + 1e-12 * (1 + base.abs()))
            if not bool(worse.any()):
                break
            length = torch.where(worse, 0.5 * length, length)
        dual = _largest(point.lam, step.lam) * (~done).unsqueeze(-1)
        frozen = done.unsqueeze(-1)  # a step of 0 * inf would make them NaN
        x, slack = torch.where(frozen, point.x, x), torch.where(frozen, point.slack, slack)
        point = Point(
            x,
            torch.where(frozen, point.nu, point.nu + dual * step.nu),
            torch.where(frozen, point.lam, point.lam + dual * step.lam),
            slack,
        )
    d = derivatives(point)
    done = (_error(d, point, torch.zeros_like(mu)) <= 100 * tolerance).squeeze(-1)
    status = torch.where(
        done, int(Status.SOLVED), torch.where(_finite(first), _diagnose(d, point, first), int(Status.NOT_FINITE))
    )
    return point._replace(nu=unit * point.nu, lam=unit * point.lam), status


def _error(d: Derivatives, point: Point, mu: Tensor) -> Tensor:
    """(B, 1): the largest violated condition, relative to its terms."""
    pull, push = _t(d.E, point.nu), _t(d.G, point.lam)
    size = 1 + torch.stack([_norm(d.gradient), _norm(pull), _norm(push)]).amax(0)
    error = torch.maximum(
        _norm(d.gradient + pull + push) / size,
        torch.maximum(_norm(d.e), _norm(d.g + point.slack)) / (1 + _norm(point.x)),
    )
    if point.lam.shape[-1]:
        error = torch.maximum(error, (point.lam * point.slack - mu).abs().amax(-1) / size)
    return error.unsqueeze(-1)


def _norm1(v: Tensor) -> Tensor:
    return v.abs().sum(-1, keepdim=True)


def _norm(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=-1)


def _direction(d: Derivatives, point: Point, mu: Tensor) -> Point:
    n, m = d.gradient.shape[-1], d.e.shape[-1]
    H = d.P + d.G.mT @ ((point.lam / point.slack).unsqueeze(-1) * d.G)
    size = H.diagonal(dim1=-2, dim2=-1).abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)  # a linear objective, without inequalities
    K = H.new_zeros(len(H), n + m, n + m)
    K[:, :n, :n] = H
    K[:, :n, n:] = d.E.mT
    K[:, n:, :n] = d.E
    diagonal = K.diagonal(dim1=-2, dim2=-1)
    diagonal[:, :n] += 1e-13 * size
    diagonal[:, n:] -= 1e-13 / size
    dual = d.gradient + _t(d.E, point.nu) + _t(d.G, point.lam)
    gap, product = d.g + point.slack, point.lam * point.slack - mu
    right = torch.cat((-dual - _t(d.G, (point.lam * gap - product) / point.slack), -d.e), -1)
    u = torch.linalg.solve_ex(K, right.unsqueeze(-1)).result.squeeze(-1)
    dx, dnu = u[:, :n], u[:, n:]
    ds = -gap - (d.G @ dx.unsqueeze(-1)).squeeze(-1)
    return Point(dx, dnu, (-product - point.lam * ds) / point.slack, ds)


def _t(M: Tensor, v: Tensor) -> Tensor:
    return (M.mT @ v.unsqueeze(-1)).squeeze(-1)


def _largest(value: Tensor, change: Tensor, fraction: float = 0.995) -> Tensor:
    """(B, 1): how far, at most 1, the values stay positive."""
    if not value.shape[-1]:
        return value.new_ones(len(value), 1)
    return (fraction / (-change / value).amax(-1, keepdim=True).clamp(min=1e-300)).clamp(max=1.0)


def _finite(d: Derivatives) -> Tensor:
    """(B,): whether all values and derivatives are."""
    parts = [getattr(d, field.name) for field in dataclasses.fields(d)]
    return torch.stack([torch.isfinite(part).reshape(len(part), -1).all(-1) for part in parts]).all(0)


def _contradictory(d: Derivatives) -> Tensor:
    """(B,): whether no step meets the equalities, which are affine: what is left of e outside the range of E."""
    E, e = d.E.nan_to_num(0.0, 0.0, 0.0), d.e.nan_to_num(0.0, 0.0, 0.0)
    rest = e - (E @ (torch.linalg.pinv(E, rtol=1e-12) @ e.unsqueeze(-1))).squeeze(-1)
    return _norm(rest) > 1e-7 * (1 + _norm(e))


def _diagnose(d: Derivatives, point: Point, first: Derivatives) -> Tensor:
    """Why it did not converge, where this shows: multipliers that grow without bound prove infeasibility."""
    size = _norm(point.nu) + _norm(point.lam)
    pull = _norm(_t(d.E, point.nu) + _t(d.G, point.lam))
    violated = torch.maximum(d.e.abs().amax(-1) if d.e.shape[-1] else torch.zeros_like(size), torch.zeros_like(size))
    if d.g.shape[-1]:
        violated = torch.maximum(violated, d.g.amax(-1))
    infeasible = (size > 1e6) & (pull < 1e-4 * size) & (violated > 1e-7)
    unbounded = (_norm(point.x) > 1e6) & (d.f < -1e4) & (violated < 1e-3 * _norm(point.x))
    status = torch.full_like(size, float(int(Status.NOT_CONVERGED))).long()
    status = torch.where(unbounded, int(Status.UNBOUNDED), status)
    status = torch.where(infeasible, int(Status.INFEASIBLE), status)
    if d.e.shape[-1] and bool((violated > 1e-7).any()):
        status = torch.where((violated > 1e-7) & _contradictory(first), int(Status.INCONSISTENT), status)
    return status
