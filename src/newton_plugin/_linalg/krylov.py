r"""``(H_i + d I)^-p g_i`` for all samples at once, from Hessian-vector products alone.

This is the conjugate gradient method, written as Lanczos' recurrence. It builds, for each sample, an orthonormal basis
V of span{g, H g, H^2 g, ...} in which H is a small tridiagonal matrix T = V' H V. Where H + d I is positive definite,
``|g| V (T + d I)^-1 e_1`` is the iterate of conjugate gradients, with the same residual. But T also shows where
conjugate gradients break down: a negative eigenvalue of T is a direction of negative curvature. With

    step = |g| V f(T) e_1,      f(l) = (|l| + d)^-p,

the step is that of the dense repair (:func:`newton_plugin._linalg.damped_inverse.repaired_inverse`) as soon as V spans
all that H makes of g. Before that, after any number of products and for any H, ``g' step = |g|^2 e_1' f(T) e_1 > 0``
and ``|step| <= d^-p |g|``: neither an ascent direction nor divergence is possible. (The dense solve uses ``l + d`` for
a negative eigenvalue as long as all of H + d I is positive. A small T may see only such an eigenvalue while H has
others below -d. Steps six times too long were measured then, so |l| is used here at once. The two differ for a Hessian
whose lowest eigenvalue lies between -d and 0.)

All samples go in lockstep: one Hessian-vector product of the whole batch a round. The basis is kept, so memory is
(rounds + 6) N m. A new vector is orthogonalised against the first one, which the bound on ``g' step`` needs.
Where more than 16 rounds are allowed, it is orthogonalised against all from the ninth round on. Without that a hard
problem (eigenvalues from 1e-6 to 100) stays at an error of 10 % after as many products as it has features; with it the
step is exact there. At 16 rounds and less it would double the time, and no gain was measured.

A training step gets eight rounds unless it asks for more. Relative error against the step that this
converges to, and cosine with it, at m = 200 (40 samples; ``benchmarks.large_outputs.errors``):

=========================================  ==============  ==============
loss, damping                              8 products      16
=========================================  ==============  ==============
convex, neighbours coupled, 0.1            .02, 1.00       .003, 1.00
7 % of the eigenvalues negative, 0.1       .22, .98        .10, .99
half of the eigenvalues negative, 0.1      .50, .89        .33, .95
the same, 0.01                             .88, .57        .81, .60
=========================================  ==============  ==============

Where H is definite, the residual says how far the step is from the exact one. Where it is not, ``1 / (|l| + d)`` has a
kink at 0, and many products may be needed to see on which side of it eigenvalues lie. The step is then one of the safe
steps in between, not the dense one. There is no preconditioner: it would change the matrix whose eigenvalues are
repaired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError, check_positive
from newton_plugin._runtime.transforms import readable

__all__ = ["KrylovOptions", "KrylovStep", "add_product", "check_krylov", "lockstep_power"]

# Rounds after which the residuals are checked. Each check waits for the device, and costs N small eigenproblems. Where
# Python cannot look (vmap, torch.compile) all rounds are taken.
_CHECKS = frozenset((4, 6, 8, 12, 16, 24)) | frozenset(range(32, 4096, 32))
_FEW_ROUNDS = 16  # up to so many rounds in all, a new vector is orthogonalised against the first one alone
_TRUSTED_ROUNDS = 8  # and in longer solves for so many; then against all


@dataclass(frozen=True)
class KrylovOptions:
    """When to stop.

    Attributes:
        tolerance: on the norm of every sample's residual ``g - (H + d I) step``, against that of its gradient.
        most: rounds at most.
    """

    tolerance: float = 0.03
    most: int = 8


def check_krylov(tolerance: Any, products: Any) -> KrylovOptions:
    """The two arguments of a user, validated."""
    check_positive("tolerance", tolerance, "It is relative to the norm of the gradient.")
    if isinstance(products, bool) or not isinstance(products, int):
        raise ArgumentTypeError(f"products must be a positive integer; got {products!r}.")
    if products < 1:
        raise ArgumentError(f"products must be a positive integer; got {products}. Fewer make a step more cautious.")
    return KrylovOptions(float(tolerance), products)


@dataclass(frozen=True)
class KrylovStep:
    """What :func:`lockstep_power` gives back.

    Attributes:
        step: (N, m).
        extremes: smallest and largest eigenvalue of any sample's H, as far as the products showed.
    """

    step: Tensor
    extremes: tuple[Tensor, Tensor]


def lockstep_power(
    product: Callable[[Tensor], Tensor],
    gradient: Tensor,
    damping: Tensor,
    power: float,
    options: KrylovOptions,
    first: Tensor | None = None,
) -> KrylovStep:
    """The step of every sample.

    Args:
        product: (N, m) -> (N, m), ``H_i v_i``.
        gradient: (N, m).
        damping: positive; no dimensions.
        power: 1 or 0.5.
        options: when to stop.
        first: ``H_i g_i``, if it is known already; saves one product.
    """
    most = min(options.most, gradient.shape[1])
    size = torch.linalg.vector_norm(gradient, dim=-1)
    basis = [_unit(gradient, size)]
    diagonal, coupling = [], []  # of T
    before = torch.zeros_like(size)  # beta_(k-1)
    largest = torch.zeros_like(size)
    weights, values = size.unsqueeze(-1), size.unsqueeze(-1)
    for k in range(1, most + 1):
        vector = basis[-1]
        new = product(vector) if k > 1 or first is None else _unit(first, size)
        alpha = _inner(new, vector)
        new = torch.addcmul(new, alpha.neg().unsqueeze(-1), vector)
        if k > 1:
            new = add_product(new, before.neg().unsqueeze(-1), basis[-2])
            for old in basis if most > _FEW_ROUNDS and k > _TRUSTED_ROUNDS else basis[:1]:
                new = add_product(new, _inner(new, old).neg().unsqueeze(-1), old)
        beta = torch.linalg.vector_norm(new, dim=-1)
        largest = torch.maximum(largest, torch.maximum(alpha.abs(), beta))
        # When the space is exhausted only rounding is left: stop, or V would get noise of unit length.
        beta = torch.where(beta > 1e-14 * largest, beta, 0.0)
        diagonal.append(alpha)
        if k == most or (k in _CHECKS and readable(beta)):
            weights, values = _weights(diagonal, coupling, damping, power)
            weights = weights * size.unsqueeze(-1)
            residual = beta * weights[:, -1].abs()
            if k == most or not bool((residual > options.tolerance * size).any()):
                break
        coupling.append(beta)
        basis.append(_unit(new, beta))
        before = beta
    step = torch.zeros_like(gradient)
    for j, vector in enumerate(basis):
        step = add_product(step, weights[:, j : j + 1], vector)
    return KrylovStep(step, (values.min(), values.max()))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total + a b``, in the memory of ``total`` except under vmap, which has no rule for that (torch 2.13)."""
    return total.addcmul_(a, b) if readable(total) else torch.addcmul(total, a, b)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)


def _unit(vector: Tensor, norm: Tensor) -> Tensor:
    """The rows at length one; zeros where the norm is zero."""
    return torch.where(norm > 0, 1 / norm, 0.0).unsqueeze(-1) * vector


def _weights(diagonal: list[Tensor], coupling: list[Tensor], damping: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """``f(T) e_1`` and the eigenvalues of T for every sample, both (N, k)."""
    matrix = torch.diag_embed(torch.stack(diagonal, -1))
    if coupling:
        beside = torch.stack(coupling, -1)
        matrix = matrix + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    finite = torch.isfinite(matrix).all(-1).all(-1)[:, None, None]
    values, vectors = torch.linalg.eigh(torch.where(finite, matrix, 0.0))
    solved = (vectors * (values.abs() + damping).pow(-power).unsqueeze(-2) * vectors[:, :1]).sum(-1)
    return torch.where(finite[:, 0], solved, torch.nan), values
