"""StocBiO: several steps of the lower level, then one plain hypergradient step."""

from __future__ import annotations

from typing import Literal

from newton_plugin.bilevel._hypergradient.oracle import Oracle
from newton_plugin.bilevel._methods.optimizer import BilevelOptimizer, Params, Update
from newton_plugin.bilevel._methods.options import Options
from newton_plugin.bilevel._tensors import Vector

__all__ = ["StocBiO"]


class StocBiO(BilevelOptimizer):
    r"""Stochastic bilevel optimizer with warm starts (Ji, Yang and Liang, ICML 2021, algorithm 2).

    .. code-block:: text

        y = y - lr_lower grad_y G                            lower_steps times, from the y of the last step
        h = grad_x F - D2_xy G v,   v by the Neumann series  at (x, y)
        x = x - lr_upper h

    Args:
        upper_params, lower_params, lr_lower, solver, terms, scale, lower_steps, lower_every, hvp: see :class:`AccBO`.
        lr_upper: learning rate of x.

    As implemented: all products of one step use the same sample of ``lower_closure``. The paper draws a minibatch of
    growing size for each term of the series.

    Example, ``F = 1/2 (y - 1)^2`` above ``G = 1/2 (y - x)^2``, so that ``y* = x`` and the best x is 1:
        >>> import torch
        >>> from newton_plugin.bilevel import StocBiO
        >>> x, y = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
        >>> opt = StocBiO([x], [y], lr_upper=0.1, lr_lower=0.5)
        >>> for _ in range(200):
        ...     loss = opt.step(lambda: 0.5 * (y - 1) ** 2, lambda: 0.5 * (y - x) ** 2)
        >>> round(x.item(), 3)
        1.0
    """

    def __init__(
        self,
        upper_params: Params,
        lower_params: Params,
        *,
        lr_upper: float,
        lr_lower: float,
        solver: Literal["linear", "neumann", "cg"] = "neumann",
        terms: int = 10,
        scale: float | None = None,
        lower_steps: int = 10,
        lower_every: int = 1,
        hvp: Literal["autograd", "finite_difference"] = "autograd",
    ) -> None:
        super().__init__(
            upper_params,
            lower_params,
            Options(
                {"upper": {"lr": lr_upper}, "lower": {"lr": lr_lower}},
                solver=solver,
                terms=terms,
                scale=scale,
                hvp=hvp,
                lower_steps=lower_steps,
                lower_every=lower_every,
            ),
        )

    def _advance(self, oracle: Oracle, x: Vector, y: Vector) -> Update:
        y = self._lower_descent(oracle, y)
        new = self._options.system.estimate(oracle, self._solver_state(oracle.lower))
        return Update(new.value, self._descended("upper", x, new.h), y, new.state)
