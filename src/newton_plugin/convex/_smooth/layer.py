r"""ConvexLayer: the solution of any smooth convex program as a differentiable function of its parameters.

The optimality conditions F(u, theta) = 0 define u = (x, nu, lam). Start *at* the solution u0, a constant. One step of
Newton's method with the constant matrix K = dF/du,

    u1 = u0 - K^-1 F(u0, theta),

changes no value but has the right derivative, du/dtheta = -K^-1 dF/dtheta. Its backward is that of BPQP: ``z' d(grad_x
Lagrangian)/dtheta + w' d(constraints)/dtheta`` with (z, w) from a linear system in the Hessian of the Lagrangian
and the active rows. A second step with the same K has the right second derivative: an error of order d in theta
is one of order d^2 after the first step and of order d^3 after the second. Both steps are ordinary torch operations, so
vmap, jacrev and hessian need nothing special. Derivatives beyond the second are not right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from newton_plugin._errors import ArgumentError, ArgumentTypeError, ShapeError, check_choice
from newton_plugin._runtime.compiler import eager
from newton_plugin.convex._smooth.find_point import FindPoint, Request
from newton_plugin.convex._smooth.program import Fn, Program

__all__ = ["ConvexLayer", "ConvexSolution"]


class ConvexSolution(NamedTuple):
    """x (..., n); multipliers nu (..., m) of e = 0 and lam (..., k) >= 0 of g <= 0; status (...); active (..., k)."""

    x: Tensor
    nu: Tensor
    lam: Tensor
    status: Tensor
    active: Tensor


class ConvexLayer(torch.nn.Module):
    r"""``argmin_x objective(x, theta)`` subject to ``equality(x, theta) = 0`` and ``inequality(x, theta) <= 0``.

    Args:
        objective: ``(x, theta) -> scalar``, convex in x and twice differentiable.
        equality: ``(x, theta) -> (m,)``, affine in x, or None.
        inequality: ``(x, theta) -> (k,)``, each entry convex in x and twice differentiable at the solution,
            or None. A second-order cone is one entry: ``norm(A @ x + b) - (c @ x + d)``.
        variables: n, the length of x.
        solver: None (the built-in interior-point method) or a callable ``theta -> (x, nu, lam)`` for one theta;
            its answer is polished and checked, including its active rows, so moderate accuracy is enough.
        start: (n,), where the built-in method begins: inside the domain of all three functions (of a logarithm, say),
            and not a point where a norm of the program has its kink. Default: small numbers near 0.
        on_failure: ``"raise"``, ``"warn"`` or ``"nan"``, as for :func:`solve_qp`.

    Call it with theta: a tensor, or a tuple, list or dict of tensors; it gives x (n,). For a batch say which
    dimension of theta is the batch, as for ``torch.vmap``: ``layer(theta, in_dims=0)`` gives x (B, n);
    ``layer.solve(theta, in_dims)`` gives the multipliers too. First and second derivatives are exact.
    float32 in gives float32 out; the functions are called with float64. On the boundary, where a row has slack and
    multiplier zero, x has a kink: the row counts as inactive, and the derivative is that of theta moving x inwards.

    Raises:
        ProblemFailedError: no solution, or not convex where that shows, with ``on_failure="raise"``.
        ArgumentError, ArgumentTypeError, ShapeError: an argument or a result that does not fit.

    The nearest point of the unit disc, a second-order cone program:

    >>> layer = ConvexLayer(
    ...     lambda x, t: ((x - t) ** 2).sum(),
    ...     inequality=lambda x, t: torch.linalg.vector_norm(x)[None] - 1,
    ...     variables=2,
    ... )
    >>> [round(v, 6) for v in layer(torch.tensor([3.0, 4.0])).tolist()]
    [0.6, 0.8]
    >>> [round(v, 6) for v in layer(torch.tensor([0.3, 0.1])).tolist()]  # inside
    [0.3, 0.1]
    """

    def __init__(
        self,
        objective: Fn,
        equality: Fn | None = None,
        inequality: Fn | None = None,
        *,
        variables: int,
        solver: Callable[[Any], Any] | None = None,
        start: Tensor | None = None,
        on_failure: str = "raise",
    ) -> None:
        super().__init__()
        for name, fn in (("objective", objective), ("equality", equality), ("inequality", inequality)):
            if not callable(fn) and not (fn is None and name != "objective"):
                raise ArgumentTypeError(f"{name} must be a function (x, theta) -> tensor; got {type(fn).__name__}.")
        if isinstance(variables, bool) or not isinstance(variables, int) or variables < 1:
            raise ArgumentError(f"variables must be a positive integer, the length of x; got {variables!r}.")
        if solver is not None and not callable(solver):
            raise ArgumentTypeError(f"solver must be None or a callable theta -> (x, nu, lam); got {solver!r}.")
        if start is not None and tuple(start.shape) != (variables,):
            raise ShapeError(f"start must have shape ({variables},); got {tuple(start.shape)}.")
        check_choice("on_failure", on_failure, ("raise", "nan", "warn"))
        self.objective, self.equality, self.inequality = objective, equality, inequality
        self.variables, self.solver, self.start, self.on_failure = variables, solver, start, on_failure

    def extra_repr(self) -> str:
        return f"variables={self.variables}, on_failure={self.on_failure!r}"

    def forward(self, theta: Any, in_dims: Any = None) -> Tensor:
        """x (n,), or (B, n)."""
        return self.solve(theta, in_dims).x

    @eager
    def solve(self, theta: Any, in_dims: Any = None) -> ConvexSolution:
        """The whole :class:`ConvexSolution`."""
        if torch.is_inference_mode_enabled() and not torch.func.grad(torch.square)(torch.ones(())):
            # torch 2.6: there torch.func.grad is zero.
            with torch.inference_mode(False), torch.no_grad():
                return self.solve(pytree.tree_map_only(Tensor, Tensor.clone, theta), in_dims)
        if in_dims is None:
            return self._solve_one(theta)
        return torch.vmap(self._solve_one, in_dims=(in_dims,))(theta)

    def _solve_one(self, theta: Any) -> ConvexSolution:
        leaves, spec = pytree.tree_flatten(theta)
        if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise ArgumentTypeError(
                "theta must be a tensor, or a tuple, list or dict of tensors; "
                f"got {', '.join(sorted({type(leaf).__name__ for leaf in leaves})) or 'nothing'}."
            )
        floating = [leaf for leaf in leaves if leaf.is_floating_point()]
        dtype = torch.get_default_dtype() if not floating else floating[0].dtype
        for leaf in floating[1:]:
            dtype = torch.promote_types(dtype, leaf.dtype)
        wide = tuple(leaf.double() if leaf.is_floating_point() else leaf for leaf in leaves)
        program = Program(self.objective, self.equality, self.inequality, spec)
        request = Request(self, program, (None,) * len(wide))
        u, m_count, active, inverse, status = FindPoint.apply(request, *wide)
        sizes = (self.variables, len(m_count))
        for _ in range(2):
            u = u - inverse @ program.residual(u, wide, active, sizes)
        n, m = sizes
        if self.on_failure != "raise":
            u = torch.where(status == 0, u, torch.nan)
        u = u.to(dtype)
        return ConvexSolution(u[:n], u[n : n + m], u[n + m :], status, active)
