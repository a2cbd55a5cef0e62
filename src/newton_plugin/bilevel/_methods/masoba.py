"""MA-SOBA: one loop, all derivatives at one point, a moving average of the hypergradient."""

from __future__ import annotations

from typing import Literal

from newton_plugin.bilevel._hypergradient.oracle import Oracle
from newton_plugin.bilevel._methods.optimizer import BilevelOptimizer, Params, Update
from newton_plugin.bilevel._methods.options import Options
from newton_plugin.bilevel._tensors import Vector

__all__ = ["MASOBA"]


class MASOBA(BilevelOptimizer):
    r"""Moving-average SOBA (Chen, Xiao and Balasubramanian, 2023, arXiv 2306.12067). **Try this one first.**

    x, y and the solution v of the linear system move at the same time, each by one step from the same point:

    .. code-block:: text

        h = grad_x F - D2_xy G v
        m = beta m + (1 - beta) h
        v = v - scale (D2_yy G v - grad_y F)
        y = y - lr_lower grad_y G
        x = x - lr_upper m

    A step takes one gradient of each loss and one second backward pass; nothing is evaluated twice.

    Args:
        upper_params, lower_params, lr_lower, beta, terms, scale, hvp: see :class:`AccBO`. The first v is
            ``terms`` steps from zero.
        lr_upper: learning rate of x; unlike AccBO's it multiplies m itself.

    As implemented: x moves with the average that contains the newest h. In the paper it moves with the average of the
    step before.

    Example, ``F = 1/2 (y - 1)^2`` above ``G = 1/2 (y - x)^2``, so that ``y* = x`` and the best x is 1:
        >>> import torch
        >>> from newton_plugin.bilevel import MASOBA
        >>> x, y = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
        >>> opt = MASOBA([x], [y], lr_upper=0.1, lr_lower=0.5)
        >>> for _ in range(300):
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
        beta: float = 0.9,
        terms: int = 10,
        scale: float | None = None,
        hvp: Literal["autograd", "finite_difference"] = "autograd",
    ) -> None:
        super().__init__(
            upper_params,
            lower_params,
            Options(
                {"upper": {"lr": lr_upper, "beta": beta}, "lower": {"lr": lr_lower}},
                solver="linear",
                terms=terms,
                scale=scale,
                hvp=hvp,
            ),
        )

    def _advance(self, oracle: Oracle, x: Vector, y: Vector) -> Update:
        state = self._solver_state(oracle.lower)
        new = self._options.system.estimate(oracle, state, lower_gradient=True)
        assert new.lower_gradient is not None
        m = self._averaged(oracle, "momentum", new.h)
        return Update(
            new.value,
            self._descended("upper", x, m),
            self._descended("lower", y, new.lower_gradient),
            new.state,
            {"momentum": m},
        )
