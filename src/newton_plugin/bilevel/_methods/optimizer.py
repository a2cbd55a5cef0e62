"""What the bilevel optimizers share: two levels of parameter groups, closures, and all-or-nothing steps.

One ``torch.optim.Optimizer`` holds both levels, so that schedulers, checkpoints, Lightning and ``add_param_group``
see what they know: each group has a ``"level"``, ``"upper"`` or ``"lower"``, and a learning rate of its own. A
method computes the new parameters and the new state from copies (``_advance``); they are stored together when
nothing has failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError, NonFiniteError, check_choice, check_positive
from newton_plugin.bilevel._errors import GradScalerError
from newton_plugin.bilevel._hypergradient.estimate import LinearSystem, SolverState
from newton_plugin.bilevel._hypergradient.oracle import Oracle, OracleCalls
from newton_plugin.bilevel._parameters import check_count, check_disjoint, check_fraction, level_groups
from newton_plugin.bilevel._tensors import axpy_each, lerp, norm, scale

__all__ = ["BilevelOptimizer", "Update"]

Vector = list[Tensor]
Closure = Callable[[], Tensor]
Params = Iterable[Any]


@dataclass
class Update:
    """The outcome of one step: new values of x and y, new entries of the state by name, and F where h was taken."""

    value: Tensor
    upper: Vector
    lower: Vector
    solver: SolverState
    upper_state: dict[str, Vector] = field(default_factory=dict)
    lower_state: dict[str, Vector] = field(default_factory=dict)


class BilevelOptimizer(torch.optim.Optimizer):
    """Base of the methods; see :class:`AccBO` for the arguments.

    Attributes:
        calls: oracle calls so far (:class:`OracleCalls`); counted from zero after loading a checkpoint.
    """

    _own_settings: tuple[str, ...] = ()  # attributes of subclasses that a copy has to know

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # Only a GradScaler, and those who hold one, ask this: the one place to meet them before they fail.
        raise GradScalerError(
            f"{type(self).__name__} cannot be stepped through a GradScaler: it differentiates the closures itself, so "
            "no gradient is ever scaled or unscaled. Call opt.step(upper_closure, lower_closure) and use bfloat16 "
            '(torch.autocast, or precision="bf16-mixed"), which needs no scaler, or float32.'
        )

    def __init__(
        self,
        upper_params: Params,
        lower_params: Params,
        *,
        upper_defaults: Mapping[str, float],
        lower_defaults: Mapping[str, float],
        system: LinearSystem,
        lower_steps: int = 1,
        lower_every: int = 1,
    ) -> None:
        check_choice("solver", system.solver, ("neumann", "linear", "cg"))
        check_choice("hvp", system.hvp, ("autograd", "finite_difference"))
        check_count("terms", system.terms)
        if system.scale is not None:
            check_positive("scale", system.scale, "It is at most 1/L of the lower loss, and not the learning rate.")
        self._system = system
        self._lower_steps = check_count("lower_steps", lower_steps)
        self._lower_every = check_count("lower_every", lower_every)
        self._level_defaults = {"upper": dict(upper_defaults), "lower": dict(lower_defaults)}
        self.calls = OracleCalls()
        groups = level_groups("upper", "upper_params", upper_params)
        super().__init__([*groups, *level_groups("lower", "lower_params", lower_params)], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it names its ``"level"``, and may have its own values of what the constructor was given."""
        check_choice("level", param_group.get("level"), ("upper", "lower"), "Add 'level' to the parameter group.")
        level = param_group["level"]
        for name, default in self._level_defaults[level].items():
            value = param_group.setdefault(name, default)
            if name == "lr":
                check_positive(f"lr_{level}", value)
            else:
                check_fraction(name, value)
        held = param_group["params"]
        added = [p[1] if isinstance(p, tuple) else p for p in ([held] if isinstance(held, Tensor) else held)]
        if any(isinstance(p, Tensor) and not p.is_floating_point() for p in added):
            raise ArgumentTypeError(f"{level}_params must be real floating-point tensors.")
        others = [p for g in self.param_groups if g["level"] != level for p in g["params"]]
        check_disjoint(*((added, others) if level == "upper" else (others, added)))
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """All of it: torch's own leaves out what subclasses add."""
        own = ("_system", "_lower_steps", "_lower_every", "_level_defaults", "calls", *self._own_settings)
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def warm_start(self, lower_closure: Closure, steps: int) -> Tensor:
        """Train the lower level alone, x as it is: ``steps`` steps, each on what the closure returns then.

        The steps are those that the method makes at its lower level. Start from the result: the hypergradient at a
        y far from the lower minimum means little.

        Returns:
            The lower loss where the last gradient was taken, detached.

        Raises:
            As :meth:`step`; the parameters are then as they were.
        """
        steps = check_count("steps", steps)
        upper, lower = self._active("upper"), self._active("lower")
        oracle = Oracle(None, lower_closure, upper, lower, self.calls)
        with oracle.undone_on_error() as (_, y):
            previous, value = y, y[0]
            for _ in range(steps):
                w = self._extrapolated(y, previous)
                oracle.place(y=w)
                value, gradient = oracle.lower_value_and_gradient(repeats=False)
                previous, y = y, self._descended("lower", w, gradient)
            _check_finite(norm(y), "the lower parameters after warm_start", "Lower lr_lower.")
        oracle.place(y=y)
        for p in lower:
            for name in ("previous", "average"):
                self.state[p].pop(name, None)
        return value

    def step(  # type: ignore[override]
        self,
        upper_closure: Closure | None = None,
        lower_closure: Closure | None = None,
        *,
        closure: Closure | None = None,
    ) -> Tensor:
        """One step of both levels.

        Args:
            upper_closure, lower_closure: return F and G at the current parameters: one number each, without
                ``backward()``. They are evaluated several times, on one sample: draw the batch before.
            closure: another name of ``upper_closure``, the one that Lightning uses.

        Returns:
            The upper loss where the hypergradient was taken, detached.

        Raises:
            NoGradientError: a loss is detached, or does not depend on the parameters it should depend on.
            NonFiniteError: NaN or infinity in the hypergradient (one host synchronisation a step finds out).
            DoubleBackwardError, SingularCurvatureError: see :func:`hypergradient`.
            GradScalerError: called through a ``GradScaler``.

        After an exception, parameters and state are as they were before.
        """
        upper_closure = closure if upper_closure is None else upper_closure
        for name, given in (("upper_closure", upper_closure), ("lower_closure", lower_closure)):
            if not callable(given):
                raise ArgumentTypeError(
                    f"step needs {name}, a function without arguments that returns the loss; got {given!r}. Call "
                    "opt.step(upper_closure, lower_closure), in Lightning opt.step(closure=..., lower_closure=...)."
                )
        upper, lower = self._active("upper"), self._active("lower")
        oracle = Oracle(upper_closure, lower_closure, upper, lower, self.calls, self._progress["steps"] == 0)
        with oracle.undone_on_error() as (x, y):
            update = self._advance(oracle, x, y)
            size = norm([norm(update.upper), norm(update.lower)])
            _check_finite(
                size,
                "the step",
                "Lower lr_lower or scale, add weight decay to the lower loss, or clip inside the closures.",
            )
        oracle.place(update.upper, update.lower)
        for params, entries in ((oracle.upper, update.upper_state), (oracle.lower, update.lower_state)):
            for name, values in entries.items():
                for p, value in zip(params, values, strict=True):
                    self.state[p][name] = value
        if update.solver.solution is not None:
            for p, value in zip(oracle.lower, update.solver.solution, strict=True):
                self.state[p]["solution"] = value
        progress = {**self._progress, "steps": self._progress["steps"] + 1}  # a new one: checkpoints refer to the old
        if update.solver.bound is not None:
            progress["bound"] = update.solver.bound
        self.state["progress"] = progress  # type: ignore[index]
        return update.value

    def _advance(self, oracle: Oracle, x: Vector, y: Vector) -> Update:
        """The method: new values from the copies ``x`` and ``y``; may place anything into the parameters."""
        raise AssertionError(f"{type(self).__name__} is the base of the methods; use AccBO, MASOBA, BOREP or StocBiO.")

    @property
    def _progress(self) -> dict[str, Any]:
        # torch keeps state that belongs to no parameter under keys that are not tensors, and saves it with the rest.
        return self.state.get("progress", {"steps": 0})  # type: ignore[call-overload]

    def _solver_state(self, lower: Sequence[Tensor]) -> SolverState:
        known = [self.state[p].get("solution") for p in lower]
        if all(v is None for v in known):
            return SolverState(None, self._progress.get("bound"))
        solution = [torch.zeros_like(p) if v is None else v for p, v in zip(lower, known, strict=True)]
        return SolverState(solution, self._progress.get("bound"))

    def _active(self, level: str) -> list[Tensor]:
        params = [p for g in self.param_groups if g["level"] == level for p in g["params"] if p.requires_grad]
        if not params:
            raise ArgumentError(
                f"none of the {level}_params requires grad, so nothing is left to train at the {level} level. "
                "Unfreeze some, or leave bilevel optimization."
            )
        return params

    def _each(self, level: str, name: str) -> list[float]:
        """An option of the level's groups, for each active parameter."""
        groups = [g for g in self.param_groups if g["level"] == level]
        return [float(g[name]) for g in groups for p in g["params"] if p.requires_grad]

    def _read(self, params: Sequence[Tensor], name: str, default: Sequence[Tensor]) -> Vector:
        """Entries of the state; a parameter that has none yet (the first step, or frozen before) has the default."""
        return [self.state[p].get(name, d) for p, d in zip(params, default, strict=True)]

    def _extrapolated(self, y: Vector, previous: Vector) -> Vector:
        """``y + gamma (y - previous)``."""
        if "gamma" not in self._level_defaults["lower"]:
            return y
        return lerp(previous, y, [1 + gamma for gamma in self._each("lower", "gamma")])

    def _descended(self, level: str, start: Vector, direction: Vector) -> Vector:
        """``start - lr direction``."""
        return axpy_each([-lr for lr in self._each(level, "lr")], direction, start)

    def _normalized(self, x: Vector, direction: Vector, eps: float) -> Vector:
        """``x - lr direction / ||direction||``, one norm over all tensors."""
        return self._descended("upper", x, scale(direction, 1 / norm(direction).clamp_min(eps)))

    def _averaged(self, oracle: Oracle, name: str, h: Vector) -> Vector:
        """The moving average ``beta m + (1 - beta) h`` of a state entry; h the first time."""
        return lerp(h, self._read(oracle.upper, name, h), self._each("upper", "beta"))

    def _lower_descent(self, oracle: Oracle, y: Vector) -> Vector:
        """``lower_steps`` plain gradient steps where they are due; the parameters are then there."""
        if self._lower_due():
            for _ in range(self._lower_steps):
                y = self._descended("lower", y, oracle.lower_gradient())
                oracle.place(y=y)
        return y

    def _lower_due(self) -> bool:
        return self._progress["steps"] % self._lower_every == 0


def _check_finite(size: Tensor, what: str, remedy: str) -> None:
    if not bool(torch.isfinite(size)):
        raise NonFiniteError(f"{what} holds NaN or infinity; the parameters are as they were. {remedy}")
