"""What the bilevel optimizers share: parameter groups of two levels, and steps that succeed or change nothing.

One ``torch.optim.Optimizer`` holds both levels, so that schedulers, checkpoints, Lightning and ``add_param_group``
work as with any optimizer. Each group has a ``"level"``, ``"upper"`` or ``"lower"``, and a learning rate of its own.
A method computes new parameters and new state from copies (``_advance``); both are stored once nothing has failed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError, NonFiniteError, check_choice, check_positive
from newton_plugin.bilevel._errors import GradScalerError, check_count, check_fraction
from newton_plugin.bilevel._hypergradient.divergence import grown, strayed, warn_of_divergence
from newton_plugin.bilevel._hypergradient.estimate import SolverState
from newton_plugin.bilevel._hypergradient.oracle import Closure, Oracle, OracleCalls
from newton_plugin.bilevel._methods.options import Options
from newton_plugin.bilevel._parameters import check_disjoint, level_groups
from newton_plugin.bilevel._tensors import Vector, axpy_each, lerp, norm, numbers, scale

__all__ = ["BilevelOptimizer", "Params", "Update"]

Params = Iterable[Any]


@dataclass
class Update:
    """The outcome of one step.

    Attributes:
        value: F where the hypergradient was taken, detached.
        upper, lower: new values of x and y.
        solver: state of the linear solver for the next step.
        upper_state, lower_state: new entries of the state of x and of y, by name.
    """

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

    _own_settings: tuple[str, ...] = ()  # attributes of a subclass that copies and pickles have to contain

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # Only a GradScaler, or a trainer that has one, reads this attribute; so the message comes before they fail.
        raise GradScalerError(
            f"{type(self).__name__} cannot be stepped through a GradScaler: it differentiates the closures itself, so "
            "no gradient is ever scaled or unscaled. Call opt.step(upper_closure, lower_closure) and use bfloat16 "
            '(torch.autocast, or precision="bf16-mixed"), which needs no scaler, or float32.'
        )

    def __init__(
        self,
        upper_params: Params,
        lower_params: Params,
        options: Options,
    ) -> None:
        self._options = options
        self.calls = OracleCalls()
        groups = level_groups("upper", "upper_params", upper_params)
        super().__init__([*groups, *level_groups("lower", "lower_params", lower_params)], {})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. It names its ``"level"`` and may have an ``lr``, ``beta``, ``gamma`` or ``tau`` of its own."""
        check_choice("level", param_group.get("level"), ("upper", "lower"), "Add 'level' to the parameter group.")
        level = param_group["level"]
        for name, default in self._options.group_defaults[level].items():
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
        """The whole optimizer; torch's method leaves out the attributes that subclasses add."""
        own = ("_options", "calls", *self._own_settings)
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def warm_start(self, lower_closure: Closure, steps: int) -> Tensor:
        """Train the lower level alone for ``steps`` steps; x stays. The closure is evaluated anew at each step.

        The steps are those that the method makes at its lower level. Call this before the first :meth:`step`: the
        hypergradient at a y far from the lower minimum means little.

        Returns:
            The lower loss where the last gradient was taken, detached.

        Raises:
            As :meth:`step`; the parameters are then as they were.
        """
        steps = check_count("steps", steps)
        upper, lower = self._active("upper"), self._active("lower")
        oracle = Oracle(None, lower_closure, upper, lower, self.calls)
        with oracle.undone_on_error() as (_, y):
            previous, value, start = y, y[0], norm(y)
            for _ in range(steps):
                w = self._extrapolated(y, previous)
                oracle.place(y=w)
                value, gradient = oracle.lower_value_and_gradient(repeats=False)
                previous, y = y, self._descended("lower", w, gradient)
            before, after = numbers([start, norm(y)])
            _check_finite([before, after], "the lower parameters after warm_start", "Lower lr_lower.")
            finding = grown("lower", after, before, max(self._each("lower", "lr")), self._progress.get("bound"))
            warn_of_divergence(type(self).__name__, " in warm_start", [finding])
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
                ``backward()``. A step evaluates them several times on the same sample: draw the batch before.
            closure: the name under which Lightning passes ``upper_closure``.

        Returns:
            The upper loss where the hypergradient was taken, detached.

        Raises:
            NoGradientError: a loss is detached, or does not depend on the parameters it should depend on.
            NonFiniteError: NaN or infinity in the hypergradient (one host synchronisation a step finds out).
            DivergenceWarning: once, if parameters or the solution of the linear system grow beyond reason.
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
            progress = self._observed(update, x, y)
        oracle.place(update.upper, update.lower)
        for params, entries in ((oracle.upper, update.upper_state), (oracle.lower, update.lower_state)):
            for name, values in entries.items():
                for p, value in zip(params, values, strict=True):
                    self.state[p][name] = value
        if update.solver.solution is not None:
            for p, value in zip(oracle.lower, update.solver.solution, strict=True):
                self.state[p]["solution"] = value
        self.state["progress"] = progress  # type: ignore[index]
        return update.value

    def _advance(self, oracle: Oracle, x: Vector, y: Vector) -> Update:
        """The method: new values from the copies ``x`` and ``y``. It may write any values into the parameters."""
        raise AssertionError(f"{type(self).__name__} is the base of the methods; use AccBO, MASOBA, BOREP or StocBiO.")

    def _observed(self, update: Update, x: Vector, y: Vector) -> dict[str, Any]:
        """The progress after this step, with what one read of the device shows of it.

        Raises:
            NonFiniteError: something is NaN or infinite.
        """
        progress = {**self._progress}  # a new dict: checkpoints hold the old one
        progress["steps"] += 1
        solver = update.solver
        lengths = [norm(update.upper), norm(update.lower)]
        if solver.excess is not None:
            lengths.append(solver.excess)
        if "start" not in progress:
            lengths += [norm(x), norm(y)]
        seen = numbers(lengths)
        _check_finite(
            seen,
            "the step",
            "Lower lr_lower or scale, add weight decay to the lower loss, or clip inside the closures.",
        )
        progress.setdefault("start", seen[-2:])
        if solver.bound is not None:
            progress["bound"] = solver.bound
        if solver.solution is not None and solver.reach is not None:
            progress["reach"] = solver.reach
        if not progress.get("diverges"):
            progress["diverges"] = self._diverges(seen, progress, 0.0 if solver.excess is None else seen[2])
        return progress

    def _diverges(self, seen: Sequence[float], progress: dict[str, Any], excess: float) -> bool:
        findings = [strayed(excess, self._options.scale)]
        for level, now, start in zip(("upper", "lower"), seen, progress["start"], strict=False):
            findings.append(grown(level, now, start, max(self._each(level, "lr")), progress.get("bound")))
        # Between the user's line and this one are torch's wrapper, step and _observed.
        return warn_of_divergence(type(self).__name__, f" at step {progress['steps']}", findings, stacklevel=6)

    @property
    def _progress(self) -> dict[str, Any]:
        # State that belongs to no parameter: torch saves entries whose key is not a tensor as they are.
        return self.state.get("progress", {"steps": 0})  # type: ignore[call-overload]

    def _solver_state(self, lower: Sequence[Tensor]) -> SolverState:
        known = [self.state[p].get("solution") for p in lower]
        if all(v is None for v in known):
            return SolverState(None, self._progress.get("bound"))
        solution = [torch.zeros_like(p) if v is None else v for p, v in zip(lower, known, strict=True)]
        return SolverState(solution, self._progress.get("bound"), self._progress.get("reach"))

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
        """Entries of the state, with a default for parameters without one: at the first step, or frozen until now."""
        return [self.state[p].get(name, d) for p, d in zip(params, default, strict=True)]

    def _extrapolated(self, y: Vector, previous: Vector) -> Vector:
        """``y + gamma (y - previous)``."""
        if "gamma" not in self._options.group_defaults["lower"]:
            return y
        return lerp(previous, y, [1 + gamma for gamma in self._each("lower", "gamma")])

    def _descended(self, level: str, start: Vector, direction: Vector) -> Vector:
        """``start - lr direction``."""
        return axpy_each([-lr for lr in self._each(level, "lr")], direction, start)

    def _normalized(self, x: Vector, direction: Vector) -> Vector:
        """``x - lr direction / ||direction||``, one norm over all tensors."""
        return self._descended("upper", x, scale(direction, 1 / norm(direction).clamp_min(self._options.eps)))

    def _averaged(self, oracle: Oracle, name: str, h: Vector) -> Vector:
        """The moving average ``beta m + (1 - beta) h``, m an entry of the state; h at the first step."""
        return lerp(h, self._read(oracle.upper, name, h), self._each("upper", "beta"))

    def _lower_descent(self, oracle: Oracle, y: Vector) -> Vector:
        """``lower_steps`` plain gradient steps if they are due now; leaves the result in the parameters."""
        if self._lower_due():
            for _ in range(self._options.lower_steps):
                y = self._descended("lower", y, oracle.lower_gradient())
                oracle.place(y=y)
        return y

    def _lower_due(self) -> bool:
        return self._progress["steps"] % self._options.lower_every == 0


def _check_finite(numbers: Iterable[float], what: str, remedy: str) -> None:
    if not all(map(math.isfinite, numbers)):
        raise NonFiniteError(f"{what} holds NaN or infinity; the parameters are as they were. {remedy}")
