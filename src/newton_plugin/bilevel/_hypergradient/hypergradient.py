"""The hypergradient as a function, without an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

from newton_plugin._errors import check_choice, check_positive
from newton_plugin.bilevel._errors import NotConvergedError, check_count
from newton_plugin.bilevel._hypergradient.divergence import strayed, warn_of_divergence
from newton_plugin.bilevel._hypergradient.estimate import POWER_ITERATIONS, check_dependence, inverse_bound, ratio
from newton_plugin.bilevel._hypergradient.oracle import Oracle
from newton_plugin.bilevel._hypergradient.products import lower_products
from newton_plugin.bilevel._hypergradient.solvers import conjugate_gradients, largest_eigenvalue, richardson
from newton_plugin.bilevel._parameters import check_disjoint, tensors_of
from newton_plugin.bilevel._tensors import norm, subtract

__all__ = ["hypergradient"]

# Most iterations where the user gives no number of terms. CG ends after dim(y) iterations in exact arithmetic and
# after some multiple of dim(y) in floating point; the plain iteration needs about as many as the condition number.
_CG_LIMIT = 5_000
_LINEAR_LIMIT = 20_000
_NEUMANN_TERMS = 10


def hypergradient(
    upper_closure: Callable[[], Tensor],
    lower_closure: Callable[[], Tensor],
    upper_params: Iterable[Tensor],
    lower_params: Iterable[Tensor],
    *,
    solver: Literal["cg", "neumann", "linear"] = "cg",
    terms: int | None = None,
    scale: float | None = None,
    tol: float | None = None,
    hvp: Literal["autograd", "finite_difference"] = "autograd",
) -> tuple[Tensor, ...]:
    r"""The gradient of ``F(x, y*(x))`` in x, where ``y*(x)`` minimises ``G(x, .)`` and y is there now.

    .. math:: h = \nabla_x F - \nabla^2_{xy} G \, v, \qquad \nabla^2_{yy} G \, v = \nabla_y F

    The lower level must be at its minimum, or near it: the formula is evaluated at the current parameters. The lower
    loss must be strongly convex there. Parameters and their ``.grad`` are left as they are; so are random state and
    module buffers, except by each closure's first evaluation.

    Args:
        upper_closure, lower_closure: functions without arguments that return F and G at the current parameters, a
            scalar each, without ``backward()``.
        upper_params, lower_params: x and y, any iterables of tensors.
        solver: "cg", conjugate gradients; "linear", the iteration ``v - scale (H v - b)``; both to ``tol``.
            "neumann": exactly the first ``terms`` terms of ``scale sum_q (I - scale H)^q grad_y F``, identity term
            and factor included.
        terms: the largest number of products. None: 10 for "neumann", otherwise as many as ``tol`` asks for, up to
            5,000 ("cg") or 20,000 ("linear"). With ``terms``, "cg" and "linear" return what they have after so many,
            whatever the curvature.
        scale: at most 1/L, L the largest eigenvalue of ``D2_yy G``; it is not the learning rate. None: 1/L by
            ten power iterations.
        tol: residual relative to ``||grad_y F||``; None: eps^(3/4) of the dtype, 2e-12 in float64 and 6e-6 in
            float32 (with finite differences eps^(1/2)). Unused by "neumann".
        hvp: "autograd" differentiates twice; "finite_difference" needs first derivatives only.

    Returns:
        Tensors in the shapes of ``upper_params``, detached.

    Raises:
        NotConvergedError: the tolerance was not reached, and ``terms`` not given.
        SingularCurvatureError: the lower loss is not strictly convex here.
        NoGradientError: a loss is detached, or does not depend on the parameters it should depend on.
        DoubleBackwardError: an operation of the lower loss has no second derivative.

    Warns:
        DivergenceWarning: "linear" or "neumann" went away from a solution: ``scale`` is too large, or the lower loss is
            not convex.

    With "cg" and "linear" the host waits for the device once or twice an iteration.

    Source: implicit differentiation; Pedregosa, ICML 2016 (conjugate gradients); Lorraine et al., AISTATS 2020
    (Neumann series); Grazzi et al., ICML 2020 (the fixed point).

    Example, ridge regression in one dimension, ``G = 1/2 (y - 3)^2 + 1/2 x y^2``: ``y* = 3 / (1 + x)``, so that
    ``F = y`` has the hypergradient ``-3 / (1 + x)^2``:
        >>> import torch
        >>> from newton_plugin.bilevel import hypergradient
        >>> x = torch.tensor(0.5, requires_grad=True)
        >>> y = torch.tensor(2.0, requires_grad=True)
        >>> lower = lambda: 0.5 * (y - 3) ** 2 + 0.5 * x * y**2
        >>> (h,) = hypergradient(lambda: 1.0 * y, lower, [x], [y])
        >>> round(h.item(), 4)
        -1.3333
    """
    check_choice("solver", solver, ("cg", "neumann", "linear"))
    check_choice("hvp", hvp, ("autograd", "finite_difference"))
    terms = None if terms is None else check_count("terms", terms)
    scale = None if scale is None else check_positive("scale", scale, "It is at most 1/L of the lower loss.")
    upper, lower = tensors_of("upper_params", upper_params), tensors_of("lower_params", lower_params)
    check_disjoint(upper, lower)
    if tol is None:
        eps = max(torch.finfo(p.dtype).eps for p in lower)
        tol = eps**0.75 if hvp == "autograd" else eps**0.5
    tol = check_positive("tol", tol)

    oracle = Oracle(upper_closure, lower_closure, upper, lower)
    above = oracle.upper_gradients()
    products = lower_products(oracle, hvp)
    if solver == "cg":
        limit = terms or min(_CG_LIMIT, max(100, 5 * sum(p.numel() for p in lower)))
        solution = conjugate_gradients(products.lower, above.y, terms=limit, tol=tol, strict=terms is None)
    else:
        limit = terms or (_LINEAR_LIMIT if solver == "linear" else _NEUMANN_TERMS)
        step = inverse_bound(largest_eigenvalue(products.lower, above.y, POWER_ITERATIONS)) if scale is None else scale
        until = tol if solver == "linear" else None
        solution = richardson(products.lower, above.y, step=step, terms=limit, tol=until)
        excess = float(ratio(norm(solution.v), step * limit * norm(above.y)))
        warn_of_divergence("hypergradient", "", [strayed(excess, scale)])
    if solver != "neumann" and terms is None and not solution.residual <= tol:
        raise NotConvergedError(
            f'solver="{solver}" stopped after {limit} iterations at a relative residual of {solution.residual:.2g}; '
            f"tol is {tol:.2g}. The lower loss is badly conditioned or not convex here: add weight decay to it, raise "
            "tol, lower scale, or give terms= to accept what that many iterations give."
        )
    dxy = products.upper(solution.v)
    check_dependence(above.depends_on_x or products.depends_on_x)
    return tuple(subtract(above.x, dxy))
