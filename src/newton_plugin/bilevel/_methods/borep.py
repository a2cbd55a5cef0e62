"""BO-REP: normalised momentum at the upper level, plain steps at the lower level, every so many steps."""

from __future__ import annotations

from typing import Literal

from newton_plugin.bilevel._hypergradient.oracle import Oracle
from newton_plugin.bilevel._methods.optimizer import BilevelOptimizer, Params, Update
from newton_plugin.bilevel._methods.options import Options
from newton_plugin.bilevel._tensors import Vector

__all__ = ["BOREP"]


class BOREP(BilevelOptimizer):
    r"""Bilevel optimization with refined initialisation and periodic updates (Hao, Gong and Liu, ICLR 2024).

    .. code-block:: text

        y = y - lr_lower grad_y G                            lower_steps times at every lower_every-th step
        h = grad_x F - D2_xy G v,   v by the solver          at (x, y)
        m = beta m + (1 - beta) h
        x = x - lr_upper m / ||m||                           one norm over all upper tensors

    For upper losses whose second derivative grows with their gradient (recurrent networks): a normalised step is short
    even where the gradient is large.

    Args:
        upper_params, lower_params, lr_upper, lr_lower, beta, solver, terms, scale, lower_steps, lower_every, hvp,
            eps: see :class:`AccBO`; the Neumann series is the paper's solver.

    As implemented: the paper's refinement of the start (stochastic gradient steps in epochs, projected to shrinking
    balls) is :meth:`warm_start`, plain gradient steps; the projection of the periodic steps onto a ball is left out.

    Example, ``F = 1/2 (y - 1)^2`` above ``G = 1/2 (y - x)^2``, so that ``y* = x`` and the best x is 1:
        >>> import torch
        >>> from newton_plugin.bilevel import BOREP
        >>> x, y = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
        >>> opt = BOREP([x], [y], lr_upper=0.05, lr_lower=0.5)
        >>> for _ in range(60):
        ...     loss = opt.step(lambda: 0.5 * (y - 1) ** 2, lambda: 0.5 * (y - x) ** 2)
        >>> abs(x.item() - 1) < 0.3
        True
    """

    def __init__(
        self,
        upper_params: Params,
        lower_params: Params,
        *,
        lr_upper: float,
        lr_lower: float,
        beta: float = 0.9,
        solver: Literal["linear", "neumann", "cg"] = "neumann",
        terms: int = 10,
        scale: float | None = None,
        lower_steps: int = 3,
        lower_every: int = 2,
        hvp: Literal["autograd", "finite_difference"] = "autograd",
        eps: float = 1e-12,
    ) -> None:
        super().__init__(
            upper_params,
            lower_params,
            Options(
                {"upper": {"lr": lr_upper, "beta": beta}, "lower": {"lr": lr_lower}},
                solver=solver,
                terms=terms,
                scale=scale,
                hvp=hvp,
                lower_steps=lower_steps,
                lower_every=lower_every,
                eps=eps,
            ),
        )

    def _advance(self, oracle: Oracle, x: Vector, y: Vector) -> Update:
        y = self._lower_descent(oracle, y)
        new = self._options.system.estimate(oracle, self._solver_state(oracle.lower))
        m = self._averaged(oracle, "momentum", new.h)
        return Update(new.value, self._normalized(x, m), y, new.state, {"momentum": m})
