"""A smooth convex program written as torch functions, and its optimality system by torch.func.

    min f(x, theta)    subject to    e(x, theta) = 0,    g(x, theta) <= 0

f is a scalar, e and g are vectors. A batch has one x each; every leaf of theta is shared or has a batch dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from newton_plugin._errors import ArgumentTypeError, ShapeError

__all__ = ["Derivatives", "Program"]

Fn = Callable[[Tensor, Any], Tensor]


@dataclasses.dataclass(frozen=True)
class Derivatives:
    """Values and derivatives at B points: n variables, m equalities, k inequalities."""

    f: Tensor
    """(B,)."""
    gradient: Tensor
    """(B, n), of f."""
    e: Tensor
    """(B, m)."""
    E: Tensor
    """(B, m, n)."""
    g: Tensor
    """(B, k)."""
    G: Tensor
    """(B, k, n)."""
    P: Tensor
    """(B, n, n), Hessian of the Lagrangian f + nu'e + lam'g."""


class Program:
    """The functions, for one structure of theta."""

    def __init__(self, objective: Fn, equality: Fn | None, inequality: Fn | None, spec: Any) -> None:
        self.objective, self.equality, self.inequality, self.spec = objective, equality, inequality, spec

    def f(self, x: Tensor, leaves: tuple[Tensor, ...]) -> Tensor:
        value = self.objective(x, self._theta(leaves))
        if not isinstance(value, Tensor):
            raise ArgumentTypeError(f"objective must return a tensor; got {type(value).__name__}.")
        if value.numel() != 1:
            raise ShapeError(f"objective must return a scalar; got shape {tuple(value.shape)}. Sum it up.")
        return value.reshape(())

    def e(self, x: Tensor, leaves: tuple[Tensor, ...]) -> Tensor:
        return self._rows(self.equality, x, leaves)

    def g(self, x: Tensor, leaves: tuple[Tensor, ...]) -> Tensor:
        return self._rows(self.inequality, x, leaves)

    def _g_if(self, some: Tensor, x: Tensor, leaves: tuple[Tensor, ...]) -> Tensor:
        """g; unless ``some``, a constant: zero times the infinite curvature of a norm at its centre would be NaN."""
        x, *rest = (torch.where(some, t, t.detach()) if t.is_floating_point() else t for t in (x, *leaves))
        return self.g(x, tuple(rest))

    def _rows(self, fn: Fn | None, x: Tensor, leaves: tuple[Tensor, ...]) -> Tensor:
        return x[:0] if fn is None else fn(x, self._theta(leaves)).reshape(-1)

    def _theta(self, leaves: tuple[Tensor, ...]) -> Any:
        return pytree.tree_unflatten(list(leaves), self.spec)

    def residual(self, u: Tensor, leaves: tuple[Tensor, ...], active: Tensor, sizes: tuple[int, int]) -> Tensor:
        """The optimality conditions at u = (x, nu, lam), the active rows given: zero at the solution.

        Gradient of the Lagrangian; e; and g where active, lam elsewhere.
        """
        n, m = sizes
        x, nu, lam = u[:n], u[n : n + m], u[n + m :]
        some = active.any()

        def lagrangian(x: Tensor) -> Tensor:
            return self.f(x, leaves) + (nu * self.e(x, leaves)).sum() + (lam * self._g_if(some, x, leaves)).sum()

        rows = torch.where(active, self._g_if(some, x, leaves), lam)
        return torch.cat((torch.func.grad(lagrangian)(x), self.e(x, leaves), rows))

    def derivatives(
        self, x: Tensor, nu: Tensor, lam: Tensor, leaves: tuple[Tensor, ...], dims: tuple[int | None, ...]
    ) -> Derivatives:
        """Everything at B points x (B, n)."""

        def one(x: Tensor, nu: Tensor, lam: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
            some = (lam != 0).any()

            def lagrangian(x: Tensor) -> Tensor:
                return self.f(x, leaves) + (nu * self.e(x, leaves)).sum() + (lam * self._g_if(some, x, leaves)).sum()

            gradient, f = torch.func.grad_and_value(self.f)(x, leaves)
            return (
                f,
                gradient,
                self.e(x, leaves),
                torch.func.jacrev(self.e)(x, leaves) if len(nu) else x.new_zeros(0, len(x)),
                self.g(x, leaves),
                torch.func.jacrev(self.g)(x, leaves) if len(lam) else x.new_zeros(0, len(x)),
                torch.func.jacrev(torch.func.grad(lagrangian))(x),
            )

        return Derivatives(*torch.vmap(one, in_dims=(0, 0, 0, *dims))(x, nu, lam, *leaves))

    def values(
        self, x: Tensor, leaves: tuple[Tensor, ...], dims: tuple[int | None, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """f, e and g at B points."""

        def one(x: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.f(x, leaves), self.e(x, leaves), self.g(x, leaves)

        return torch.vmap(one, in_dims=(0, *dims))(x, *leaves)
