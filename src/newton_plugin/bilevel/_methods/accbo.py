"""AccBO: normalised upper steps along a variance-reduced hypergradient; Nesterov's method with averaging below."""

from __future__ import annotations

from typing import Any, Literal

from newton_plugin._errors import check_choice
from newton_plugin.bilevel._hypergradient.oracle import Oracle
from newton_plugin.bilevel._methods.optimizer import BilevelOptimizer, Params, Update
from newton_plugin.bilevel._methods.options import Options
from newton_plugin.bilevel._tensors import Vector, axpy_each, lerp, subtract

__all__ = ["AccBO"]


class AccBO(BilevelOptimizer):
    r"""Accelerated stochastic bilevel optimization (Gong, Hao and Liu, NeurIPS 2024, algorithm 1).

    Minimises ``F(x, y*(x))`` in x, where ``y*(x)`` minimises ``G(x, .)``, from samples of both. One step:

    .. code-block:: text

        w    = y + gamma (y - y_prev)                       lower level: Nesterov's accelerated gradient ...
        y    = w - lr_lower grad_y G(x, w)
        yhat = (1 - tau) yhat + tau y                       ... with averaging
        h    = grad_x F - D2_xy G v  at (x, yhat),          v ~ (D2_yy G)^-1 grad_y F  by the solver
        m    = h + beta (m - h_old)                         "storm": h_old, the same samples at (x_old, yhat_old)
        m    = beta m + (1 - beta) h                        "ema"
        x    = x - lr_upper m / ||m||                       one norm over all upper tensors

    Args:
        upper_params, lower_params: x and y: iterables of tensors (generators too), of ``(name, tensor)``, or of
            parameter groups, which may have their own ``lr``, ``beta`` (upper), ``gamma`` and ``tau`` (lower).
        lr_upper: the length of every upper step, the distance that x moves; decay it to converge.
        lr_lower: learning rate of the lower level.
        beta: how much of the past the upper direction keeps, in [0, 1].
        gamma, tau: momentum and averaging of the lower level, in [0, 1]; 0 and 1 are plain gradient steps.
        solver: how v is found. "linear" carries v along and makes one step ``v - scale (D2_yy G v - grad_y F)`` for
            the next time (at the very first step, ``terms`` of them); "neumann" sums ``terms`` terms of
            ``scale sum_q (I - scale D2_yy G)^q grad_y F`` anew; "cg" makes ``terms`` iterations of conjugate gradients.
        terms: see ``solver``.
        scale: at most 1/L, L the largest eigenvalue of ``D2_yy G``: it is *not* the learning rate. None: 1/L from
            ten power iterations at the first step; the scale is lowered whenever a product shows more curvature.
        estimator: "storm" is the paper's. It also evaluates both losses at the previous point, and cancels the noise
            that is the same at both; choose it where the lower level has little noise. "ema" is a moving average: a
            third cheaper, and preferable where the lower level is noisy.
        lower_steps, lower_every: the lower level moves ``lower_steps`` times at every ``lower_every``-th
            step (the paper's option II), and not in between.
        hvp: "autograd", or "finite_difference" for lower models that cannot be differentiated twice (recurrent layers
            on cuDNN, fused attention, torch.compile).
        eps: the least value of ``||m||`` that the step is divided by.

    Raises:
        ArgumentError, ArgumentTypeError: an argument outside its rule.

    The paper's rate, O(eps^-3) calls in place of O(eps^-4), holds only where the variance of the lower level's
    gradient is O(eps): large lower batches, or a lower level without noise. Measured at equal calls, AccBO did not beat
    :class:`MASOBA` outside that regime (``docs/bilevel.md``), so try MASOBA first.

    As implemented: the algorithm above; "neumann" is the paper's solver. "linear" comes from SOBA: h uses the v that
    was carried to this step, h_old the v that belonged to the old point. So STORM treats v as a third variable, and one
    backward pass gives both products.

    Example, ``F = 1/2 (y - 1)^2`` above ``G = 1/2 (y - x)^2``, so that ``y* = x`` and the best x is 1:
        >>> import torch
        >>> from newton_plugin.bilevel import AccBO
        >>> x, y = torch.zeros((), requires_grad=True), torch.zeros((), requires_grad=True)
        >>> opt = AccBO([x], [y], lr_upper=0.1, lr_lower=0.5)
        >>> for _ in range(30):
        ...     loss = opt.step(lambda: 0.5 * (y - 1) ** 2, lambda: 0.5 * (y - x) ** 2)
        >>> abs(x.item() - 1) < 0.2
        True
    """

    _own_settings = ("_estimator",)

    def __init__(
        self,
        upper_params: Params,
        lower_params: Params,
        *,
        lr_upper: float,
        lr_lower: float,
        beta: float = 0.9,
        gamma: float = 0.5,
        tau: float = 0.5,
        solver: Literal["linear", "neumann", "cg"] = "linear",
        terms: int = 10,
        scale: float | None = None,
        estimator: Literal["storm", "ema"] = "storm",
        lower_steps: int = 1,
        lower_every: int = 1,
        hvp: Literal["autograd", "finite_difference"] = "autograd",
        eps: float = 1e-12,
    ) -> None:
        check_choice("estimator", estimator, ("storm", "ema"))
        self._estimator = estimator
        super().__init__(
            upper_params,
            lower_params,
            Options(
                {"upper": {"lr": lr_upper, "beta": beta}, "lower": {"lr": lr_lower, "gamma": gamma, "tau": tau}},
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
        previous = self._read(oracle.lower, "previous", y)
        average = self._read(oracle.lower, "average", y)
        if self._lower_due():
            for _ in range(self._options.lower_steps):
                w = self._extrapolated(y, previous)
                oracle.place(y=w)
                previous, y = y, self._descended("lower", w, oracle.lower_gradient())
                average = lerp(average, y, self._each("lower", "tau"))

        system, start = self._options.system, self._solver_state(oracle.lower)
        oracle.place(y=average)
        new = system.estimate(oracle, start)
        if self._estimator == "ema" or not self._started(oracle):
            m = self._averaged(oracle, "momentum", new.h)
        else:
            x_old = self._read(oracle.upper, "point", x)
            y_old = self._read(oracle.lower, "point", average)
            v_old = self._read(oracle.lower, "point_solution", new.v)
            oracle.place(x_old, y_old)
            h_old = system.again(oracle, start, v_old, new.depends_on_x)
            kept = subtract(self._read(oracle.upper, "momentum", h_old), h_old)
            m = axpy_each(self._each("upper", "beta"), kept, new.h)

        upper_state: dict[str, Any] = {"momentum": m}
        lower_state: dict[str, Any] = {"previous": previous, "average": average}
        if self._estimator == "storm":
            upper_state["point"], lower_state["point"], lower_state["point_solution"] = x, average, new.v
        return Update(new.value, self._normalized(x, m), y, new.state, upper_state, lower_state)

    def _started(self, oracle: Oracle) -> bool:
        return any("momentum" in self.state[p] for p in oracle.upper)
