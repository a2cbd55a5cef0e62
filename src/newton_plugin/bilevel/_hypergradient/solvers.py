r"""Solve ``H v = b`` for the lower Hessian ``H = D2_yy G`` and ``b = grad_y F``, from products alone.

* :func:`richardson`: gradient descent on ``1/2 v'Hv - b'v``, ``v <- v - s (H v - b)``. From v = 0, Q steps are
  exactly the Neumann series ``s sum_{q<Q} (I - s H)^q b``; the first needs no product. One step from the v of the
  last iteration is the "linear" solver of SOBA and the methods derived from it. Both need ``s < 2/L``, L the largest
  eigenvalue.
* :func:`conjugate_gradients`: the best approximation in the same Krylov space, to a tolerance.
  :func:`truncated_conjugate_gradients` makes a fixed number of iterations without a host synchronisation.

:func:`largest_eigenvalue` estimates L. Every product also gives ``||H u|| / ||u|| <= L`` at no cost, so an L that was
too small, or has grown, is corrected while solving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from newton_plugin._errors import SingularCurvatureError
from newton_plugin.bilevel._tensors import Vector, add, axpy, axpy_, dot, norm, scale, xpay_, zeros_like

__all__ = [
    "conjugate_gradients",
    "largest_eigenvalue",
    "richardson",
    "stretch",
    "truncated_conjugate_gradients",
]

Product = Callable[[Sequence[Tensor]], Vector]


class Solution(NamedTuple):
    """v, and how it was reached.

    Attributes:
        v: the solution.
        residual: ``||b - H v|| / ||b||``; NaN if it was not computed.
        stretch: the largest ``||H u|| / ||u||`` that was seen, a lower bound of L; no dimensions. None if it was not
            computed.
    """

    v: Vector
    residual: float
    stretch: Tensor | None


def stretch(product: Sequence[Tensor], u: Sequence[Tensor]) -> Tensor:
    """``||H u|| / ||u||``, and 0 for u = 0."""
    length = norm(u)
    return norm(product) / length.clamp_min(torch.finfo(length.dtype).tiny)


def richardson(
    product: Product, b: Vector, *, step: float | Tensor, terms: int, tol: float | None = None, watch: bool = False
) -> Solution:
    """``s sum_{q<terms} (I - s H)^q b``; with ``tol``, until the residual is ``tol ||b||`` if that comes first.

    ``p_q = (I - s H)^q b`` is both the term and the residual of the sum of the terms before it, so the test costs
    a host synchronisation and no product. With ``watch`` it records the largest curvature that it meets.
    """
    p, total = b, b
    largest = norm(b).new_zeros(()) if watch else None
    back = -step
    target = _target(b, tol)
    residual = math.nan
    for _ in range(1, terms):
        hp = product(p)
        if largest is not None:
            largest = torch.maximum(largest, stretch(hp, p))
        p = axpy(back, hp, p)
        if tol is not None:
            residual = float(norm(p))
            if residual <= target or not math.isfinite(residual):
                break
        total = add(total, p)
    return Solution(scale(total, step), math.nan if tol is None else _relative(residual, b), largest)


def conjugate_gradients(product: Product, b: Vector, *, terms: int, tol: float, strict: bool = False) -> Solution:
    """Conjugate gradients from v = 0 until the residual is ``tol ||b||``, or for ``terms`` iterations.

    Coefficients are numbers of the host: two synchronisations an iteration on an accelerator, and no other overhead.
    At a direction of non-positive curvature it stops, or raises if ``strict``.

    Raises:
        SingularCurvatureError: ``strict``, and H is not positive definite.
    """
    v, r, p = zeros_like(b), [t.clone() for t in b], [t.clone() for t in b]
    squared = float(dot(r, r))
    target = tol * squared**0.5
    for _ in range(terms):
        if squared**0.5 <= target:
            break
        hp = product(p)
        curvature = float(dot(p, hp))
        if not curvature > 0:
            if strict:
                raise SingularCurvatureError(
                    "lower_closure: its second derivative in lower_params is not positive definite here (curvature "
                    f"{curvature / float(dot(p, p)):.3g} along a search direction). (a) The lower level is not at a "
                    "minimum: train it further. (b) It has flat directions: add weight decay to the lower loss. "
                    '(c) It is not convex: give terms=, which truncates, or solver="neumann".'
                )
            break
        alpha = squared / curvature
        axpy_(alpha, p, v)
        axpy_(-alpha, hp, r)
        before, squared = squared, float(dot(r, r))
        xpay_(r, squared / before, p)
    return Solution(v, _relative(squared**0.5, b), None)


def truncated_conjugate_gradients(product: Product, b: Vector, terms: int) -> Vector:
    """v after ``terms`` iterations, without waiting for the device.

    Where :func:`conjugate_gradients` would stop, the remaining iterations change nothing.
    """
    v, r, p = zeros_like(b), b, b
    squared = dot(r, r)
    moving = squared > 0
    for _ in range(terms):
        hp = product(p)
        curvature = dot(p, hp)
        moving = moving & (curvature > 0)
        alpha = torch.where(moving, squared / curvature, 0.0)
        v = axpy(alpha, p, v)
        r = axpy(-alpha, hp, r)
        before, squared = squared, dot(r, r)
        moving = moving & (squared > 0)
        p = axpy(torch.where(moving, squared / before, 0.0), p, r)
    return v


def _target(b: Vector, tol: float | None) -> float:
    return 0.0 if tol is None else tol * float(norm(b))


def _relative(residual: float, b: Vector) -> float:
    return residual / max(float(norm(b)), torch.finfo(b[0].dtype).tiny)


def largest_eigenvalue(product: Product, b: Vector, iterations: int) -> Tensor:
    """A lower bound of ``||H||``, close to it, by power iteration from b; no dimensions, 0 for b = 0.

    The iteration starts from b and not from noise: the series lies in the Krylov space of b, and no random number is
    drawn.
    """
    found = norm(b).new_zeros(())
    u = b
    for _ in range(iterations):
        u = scale(u, 1 / norm(u).clamp_min(torch.finfo(found.dtype).tiny))
        image = product(u)
        found = torch.maximum(found, norm(image))
        u = image
    return found
