r"""What solve_qp returns, and its derivatives in closed form.

x depends on (p, b, h) piecewise linearly. Where the active rows stay the same, the second derivative of a loss
``l(x(p))`` is therefore exactly ``J' H J`` with H = d2l/dx2 and J = dx/dp: the second derivative of x is zero. J is a
block of the inverse of the optimality system. The solver leaves the factors of that system behind, so the Hessian costs
about as much as one more backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, ShapeError, check_choice, check_floating
from newton_plugin._runtime.compiler import eager
from newton_plugin.convex._system.kkt import KKTSolve

__all__ = ["QPSolution"]

_DATA = ("Q", "p", "A", "b", "G", "h")
_LINEAR = ("p", "b", "h")


class QPSolution:
    """The solution of :func:`solve_qp`; unpacks as ``x, nu, lam, status, active``.

    Attributes:
        x: (..., n).
        nu: (..., m), multipliers of the equalities: Qx + p + A'nu + G'lam = 0.
        lam: (..., k), multipliers of the inequalities, >= 0.
        status: (...), integers, see :class:`Status`; 0 is solved.
        active: (..., k), the inequalities that hold with equality and have lam > 0.
        solver: the name of the solver that found them.
    """

    def __init__(
        self, x: Tensor, nu: Tensor, lam: Tensor, status: Tensor, active: Tensor, *, solver: str, system: Any
    ) -> None:
        self.x, self.nu, self.lam, self.status, self.active = x, nu, lam, status, active
        self.solver = solver
        self._system = system

    def __iter__(self) -> Any:
        return iter((self.x, self.nu, self.lam, self.status, self.active))

    def __repr__(self) -> str:
        return (
            f"QPSolution(x: {tuple(self.x.shape)}, nu: {tuple(self.nu.shape)}, lam: {tuple(self.lam.shape)}, "
            f"solved {int((self.status == 0).sum())} of {self.status.numel()}, solver={self.solver!r})"
        )

    @eager
    def jacobian(self, wrt: str = "p") -> Tensor:
        r"""dx/d(wrt) in closed form: (..., n, *shape of one wrt), wrt one of Q, p, A, b, G, h.

        The result is differentiable. In Q it is the derivative along symmetric changes.

        With ``x = argmin 1/2 |x|^2 + p'x`` (no constraints) ``x = -p``:

        >>> from newton_plugin.convex import solve_qp
        >>> (solve_qp(torch.eye(2), torch.ones(2)).jacobian("p") + 0.0).tolist()  # no -0.0
        [[-1.0, 0.0], [0.0, -1.0]]
        """
        check_choice("wrt", wrt, _DATA)
        if self._system is None:
            raise ArgumentError("a sparse problem has no dense Jacobian. Take products with it by torch.autograd.grad.")
        system: Any = self._system
        self._system = system = system() if callable(system) else system  # built when it is first needed
        Q, C, factors, x, y, (n, m, k), shape, dtype = system
        batch, even = x.shape[:2]
        eye = torch.eye(even, dtype=x.dtype, device=x.device)[:, :n].expand(batch, even, n)
        # Column a of K^-1 (e_a, 0): the derivative of x_a in every right-hand side.
        vx, vy = KKTSolve.apply(Q, C, eye, torch.zeros_like(y).expand(-1, -1, n), None, None, *factors)
        vx, vy = vx.mT[..., :n], vy.mT  # (B, n, n), (B, n, K)
        x, y = x.squeeze(-1)[:, :n], y.squeeze(-1)
        rows = slice(0, m) if wrt in "Ab" else slice(m, m + k)
        if wrt == "p":
            jacobian = -vx
        elif wrt in "bh":
            jacobian = vy[..., rows]
        elif wrt == "Q":
            outer = vx.unsqueeze(-1) * x[:, None, None, :]
            jacobian = -0.5 * (outer + outer.mT)
        else:
            jacobian = -(y[:, None, rows, None] * vx.unsqueeze(-2) + vy[:, :, rows, None] * x[:, None, None, :])
        return jacobian.reshape(*shape, *jacobian.shape[1:]).to(dtype)

    def hessian(self, outer: Tensor, wrt: str = "p", wrt2: str | None = None) -> Tensor:
        r"""``J' H J``, the exact Hessian of a loss of x with respect to p, b or h.

        Args:
            outer: H = d2l/dx2, (..., n, n).
            wrt, wrt2: "p", "b" or "h"; the second (default: the same) for a mixed block.

        >>> from newton_plugin.convex import solve_qp
        >>> solution = solve_qp(2 * torch.eye(2), torch.ones(2))  # x = -p/2
        >>> solution.hessian(torch.eye(2)).tolist()
        [[0.25, 0.0], [0.0, 0.25]]
        """
        for name, value in (("wrt", wrt), ("wrt2", wrt if wrt2 is None else wrt2)):
            if value not in _LINEAR:
                raise ArgumentError(
                    f"{name} must be 'p', 'b' or 'h', in which x is piecewise linear; got {value!r}. "
                    "In Q, A and G the second derivative of x counts too: use torch.func.hessian."
                )
        check_floating("outer", outer)
        n = self.x.shape[-1]
        if tuple(outer.shape[-2:]) != (n, n):
            raise ShapeError(f"outer must have shape (..., {n}, {n}), the Hessian in x; got {tuple(outer.shape)}.")
        left = self.jacobian(wrt)
        right = left if wrt2 is None or wrt2 == wrt else self.jacobian(wrt2)
        return left.mT @ outer.to(left.dtype) @ right
