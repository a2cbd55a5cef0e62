r"""The hypergradient at one point, and how its linear system is solved.

Let ``y*(x)`` minimise G(x, .). Its stationarity ``grad_y G(x, y*) = 0``, differentiated in x, gives
``D_x y* = -(D2_yy G)^-1 D2_yx G``, and the chain rule for ``F(x, y*(x))``::

    h = grad_x F - D2_xy G v,        v = (D2_yy G)^-1 grad_y F

The methods evaluate this at a y that is not yet ``y*``, with a v that is not yet exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from newton_plugin._errors import NoGradientError
from newton_plugin.bilevel._hypergradient.oracle import Oracle
from newton_plugin.bilevel._hypergradient.products import Products, lower_products
from newton_plugin.bilevel._hypergradient.solvers import (
    largest_eigenvalue,
    richardson,
    stretch,
    truncated_conjugate_gradients,
)
from newton_plugin.bilevel._tensors import Vector, axpy, norm, subtract

__all__ = ["POWER_ITERATIONS", "Estimate", "LinearSystem", "SolverState", "check_dependence", "inverse_bound", "ratio"]

POWER_ITERATIONS = 10  # they estimate L at the first step


@dataclass(frozen=True)
class SolverState:
    """What a solver carries from step to step.

    Attributes:
        solution: v, if the solver is "linear".
        bound: the largest curvature seen so far, no dimensions, if the user gave no scale.
        reach: the largest ``||v||`` that stable iterations can have reached, no dimensions, if the solver is "linear".
        excess: ``||v||`` relative to that, no dimensions; of this step, and not carried.

    An iteration ``v - s (H v - b)`` is stable if ``0 <= H <= 2/s``. Then ``||I - s H|| <= 1``, so that every iteration
    makes v longer by ``s ||b||`` at most. Beyond 1, the excess says that H is not so, and how much that has mattered.
    """

    solution: Vector | None = None
    bound: Tensor | None = None
    reach: Tensor | None = None
    excess: Tensor | None = None


@dataclass
class Estimate:
    """The hypergradient ``h`` at one point, and by-products.

    Attributes:
        value: F there, detached.
        h: in the shapes of x.
        v: the solution that h was computed with, in the shapes of y.
        state: of the solver, for the next step.
        depends_on_x: whether F depends on x directly; if not, grad_x F is zero at every other point too.
        lower_gradient: ``grad_y G`` there, if it was asked for. The products are not kept: they hold a graph.
    """

    value: Tensor
    h: Vector
    v: Vector
    state: SolverState
    depends_on_x: bool
    lower_gradient: Vector | None


@dataclass(frozen=True)
class LinearSystem:
    """How v is found.

    Attributes:
        solver: "neumann", "linear" or "cg".
        terms: of the series, or iterations.
        scale: None stands for 1/L, estimated.
        hvp: "autograd" or "finite_difference".
    """

    solver: str
    terms: int
    scale: float | None
    hvp: str

    def estimate(self, oracle: Oracle, state: SolverState, lower_gradient: bool = False) -> Estimate:
        """h where the parameters are now, from one sample of each closure."""
        upper = oracle.upper_gradients()
        products = lower_products(oracle, self.hvp)
        if self.solver == "linear":
            v, dxy, state = self._carried(products, upper.y, state)
        else:
            v, state = self._solved(products, upper.y, state)
            dxy = products.upper(v)
        check_dependence(upper.depends_on_x or products.depends_on_x)
        gradient = products.gradient if lower_gradient else None
        return Estimate(upper.value, subtract(upper.x, dxy), v, state, upper.depends_on_x, gradient)

    def again(self, oracle: Oracle, state: SolverState, v: Vector, depends_on_x: bool) -> Vector:
        """h on the same samples at another point, for STORM.

        "linear" treats v as a variable of its own, h(x, y, v), and takes the v that was used at the other point. So
        neither ``grad_y F`` nor ``D2_yy G`` is needed, and F is not evaluated if it does not contain x.
        """
        if self.solver != "linear":
            return self.estimate(oracle, state).h
        dxy = lower_products(oracle, self.hvp).upper(v)
        if not depends_on_x:
            return [-t for t in dxy]
        return subtract(oracle.upper_gradients().x, dxy)

    def _carried(self, products: Products, b: Vector, state: SolverState) -> tuple[Vector, Vector, SolverState]:
        """v from the step before; the same backward pass gives the step ``v - s (H v - b)`` for the next time."""
        v = state.solution
        if v is None:  # the first time: ``terms`` steps from zero
            v, state = self._solved(products, b, state)
        hv, dxy = products.both(v)
        if self.scale is None:
            state = self._raised(state, stretch(hv, v))
        step = self._step(state)
        following = axpy(step, subtract(b, hv), v)
        reach = (norm(v) if state.reach is None else state.reach) + step * norm(b)
        return v, dxy, replace(state, solution=following, reach=reach, excess=ratio(norm(following), reach))

    def _solved(self, products: Products, b: Vector, state: SolverState) -> tuple[Vector, SolverState]:
        if self.solver == "cg":
            return truncated_conjugate_gradients(products.lower, b, self.terms), state
        if self.scale is None and state.bound is None:
            state = replace(state, bound=largest_eigenvalue(products.lower, b, POWER_ITERATIONS))
        watch, step = self.scale is None, self._step(state)
        solution = richardson(products.lower, b, step=step, terms=self.terms, watch=watch)
        reach = step * self.terms * norm(b)
        state = self._raised(state, solution.stretch)
        return solution.v, replace(state, reach=reach, excess=ratio(norm(solution.v), reach))

    def _step(self, state: SolverState) -> float | Tensor:
        if self.scale is not None:
            return self.scale
        assert state.bound is not None
        return inverse_bound(state.bound)

    def _raised(self, state: SolverState, seen: Tensor | None) -> SolverState:
        if seen is None:
            return state
        bound = seen if state.bound is None else torch.maximum(state.bound.to(seen), seen)
        return replace(state, bound=bound)


def ratio(length: Tensor, reach: Tensor) -> Tensor:
    """``length / reach``, and 0 for 0/0."""
    return length / reach.clamp_min(torch.finfo(reach.dtype).tiny)


def inverse_bound(bound: Tensor) -> Tensor:
    """``1/L``; 1 where no curvature was seen, because the products are then zero and any step will do."""
    return torch.where(bound > 0, 1 / bound, 1.0)


def check_dependence(depends: bool) -> None:
    """Raise unless one of the losses depends on the upper parameters."""
    if not depends:
        raise NoGradientError(
            "neither loss depends on upper_params: upper_closure's has no gradient in them, and lower_closure's "
            "gradient does not contain them. Use the upper parameters, without detach(), in at least one loss (a "
            "gradient replaced by LossHook is a constant: see docs/bilevel.md)."
        )
