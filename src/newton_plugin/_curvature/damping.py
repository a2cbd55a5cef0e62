"""How much of the identity is added to the curvature before it is inverted.

``damping -> 0`` is the pure Newton step. ``damping -> infinity`` is the gradient divided by the damping.
A rule says how C is averaged and, given the scale of C, what the damping is; see :class:`Damping`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from newton_plugin._curvature.overriding import arguments_of, holds
from newton_plugin._curvature.running_mean import RunningMean
from newton_plugin._errors import ArgumentError, ArgumentTypeError, check_positive, check_range
from newton_plugin._linalg.damped_inverse import working_dtype

__all__ = [
    "AutoDamping",
    "Averaging",
    "BatchRelative",
    "Damping",
    "Tikhonov",
    "damping_for",
    "damping_of",
    "relative_damping",
    "resolve_damping",
]

_HINT = "Larger is safer: damping -> infinity is plain gradient descent."
_SLOW_DECAY = 0.999
_ROUNDING = 1e-12  # of the scale, a square: gradients of a millionth of their usual size
_LEAST = 1e-70  # least relative damping: the square of the smallest gradients, 1e-35


@dataclass(frozen=True)
class Averaging:
    """How C is averaged over batches and samples before it is inverted. The default: not at all.

    Attributes:
        decay: of the running mean of C over batches; 0 uses the batch's own C alone.
        growth: how many times the running mean's norm a single batch's C may count for.
        own: weight of a sample's own ``g_i g_i'`` beside the mean C in a Fisher of power 1, as a share of 1/m.
    """

    decay: float = 0.0
    growth: float = math.inf
    own: float = 0.0


class Damping(ABC):
    """A rule for the damping. A rule of your own is a subclass with one method, :meth:`value`.

    Attributes:
        averaging: the average of C that this rule is made for; not averaged by default.
        needs_scale: whether :meth:`value` looks at the scale of C. If not, the scale is computed only where something
            else needs it, and :meth:`value` may get any number.
        bounded: whether the damping is positive and finite for every finite scale. The step of a finite gradient is
            then finite, and is not checked. No class inherits it.

    A class that overrides :meth:`value` starts from needs_scale=True and bounded=False.

    Example:
        >>> import torch, newton_plugin as npl
        >>> class HalfTheScale(npl.Damping):
        ...     def value(self, scale):
        ...         return scale / 2
        >>> y = torch.tensor([[3.0], [1.0]])
        >>> npl.newton_step(lambda y: y.square().mean(), y, curvature="hessian", damping=HalfTheScale()).step
        tensor([[2.0000],
                [0.6667]])
    """

    averaging: Averaging = Averaging()
    needs_scale: bool = True
    bounded: bool = False
    takes_finite: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.takes_finite = "finite" in arguments_of(cls.value)
        if not holds(cls, "needs_scale", "value"):
            cls.needs_scale = True
        if "bounded" not in cls.__dict__:  # a subclass may change what value() reads
            cls.bounded = False

    @abstractmethod
    def value(self, scale: Tensor) -> Tensor:
        """The damping, in units of C: a tensor without dimensions, on the device of ``scale``.

        Args:
            scale: the size of C as one number without dimensions: its root-mean-square eigenvalue.

        Called once for each C that is computed: not between refreshes, but also for a batch whose step is not taken.
        A method with a further argument ``finite`` is told by ``finite=True`` that the scale is known to be finite.
        """

    def initial_state(self, like: Tensor) -> dict[str, Any]:
        """The state before the first step, in the form of :meth:`state_dict` after it; see ``npl.functional``.

        Args:
            like: a tensor on the device of the steps, in the dtype of C.
        """
        return self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """The running state as plain types and tensors; empty by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - nothing to restore by default
        """Restore what :meth:`state_dict` gave."""


class Tikhonov(Damping):
    """The same damping at every step, as in the paper: ``(C + damping I)^-1 g``, C of this batch alone.

    Args:
        damping: positive. It has the units of C: of the squared gradient for Fisher, of the second
            derivative for the Hessian; so a value that suits one loss says nothing about another.

    Raises:
        ArgumentError: ``damping <= 0`` or not finite.
        ArgumentTypeError: not a number.
    """

    needs_scale = False

    def __init__(self, damping: float = 0.1) -> None:
        self.damping = check_positive("damping", damping, _HINT)

    def value(self, scale: Tensor) -> Tensor:
        return torch.full_like(scale, self.damping)

    def __repr__(self) -> str:
        return f"Tikhonov({self.damping})"


class AutoDamping(Damping):
    r"""Damping relative to C itself, with C averaged so that no batch and no sample decides alone.

    Both sides of the ratio change together when the loss is multiplied by a constant, the outputs change their
    unit or the batch is duplicated, so no constant has to be found for each loss. The whole rule::

        C    = running mean of the batches' C, where one batch counts for at most growth times the mean
        d    = ratio * max(s, floor * slow running mean of s),      s = root-mean-square eigenvalue of C
        step = (C + own/m g_i g_i' + d I)^-1 g_i                    (the own term: Fisher of power 1 only)

    Each part is there because something breaks without it: relative to a single batch, the step grows without
    bound where a batch's gradients vanish (running mean) or all of them do (floor); a loss in float32 that
    explodes on a few samples silences the batches after them (growth) and throws the network off by those
    samples' own steps (own: it bounds a step by ``m / (own |g_i|)``, whatever the others do).

    Measured on six losses it was above plain training or level with it (docs/damping.md); noisy labels, batches of
    4 and the Hessian are where it is not the best choice or does harm.

    Override it with a number (``damping=0.1``: fixed, in units of C, no averaging, the paper's step), with
    ``AutoDamping(ratio=1.0)`` for a more cautious one, or with a subclass of :class:`Damping`.

    Args:
        ratio: damping over the scale of C. Positive.
        decay: of the running mean of C, in [0, 1).
        growth: most that one batch may count for, against the mean before it. At least 1, finite.
        floor: least scale, against the slow mean (decay .999) of the scale. In [0, 1).
        own: weight of each sample's own curvature, as a share of 1/m. Not negative.
    """

    bounded = True

    def __init__(
        self, ratio: float = 0.3, decay: float = 0.9, growth: float = 10.0, floor: float = 1e-3, own: float = 1.0
    ) -> None:
        self.ratio = check_positive("ratio", ratio, _HINT)
        self.floor = check_range("floor", floor, 0, 1)
        self.averaging = Averaging(
            check_range("decay", decay, 0, 1),
            check_range("growth", growth, 1, math.inf),
            check_range("own", own, 0, math.inf),
        )
        self._slow = RunningMean(nonnegative=True)

    def value(self, scale: Tensor, finite: bool = False) -> Tensor:
        """See :meth:`Damping.value`. A scale that is known to be finite saves operations."""
        if self.averaging.decay and self.floor:
            update = self._slow.update_finite if finite else self._slow.update
            scale = torch.maximum(scale, self.floor * update(scale, _SLOW_DECAY))
        return relative_damping(scale, self.ratio)

    def initial_state(self, like: Tensor) -> dict[str, Any]:
        """See :meth:`Damping.initial_state`."""
        return RunningMean.initial_state((), like) if self.averaging.decay and self.floor else {}

    def state_dict(self) -> dict[str, Any]:
        """The slow mean of the scale of C."""
        return self._slow.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._slow.load_state_dict(state)

    def __repr__(self) -> str:
        a = self.averaging
        given = {"ratio": self.ratio, "decay": a.decay, "growth": a.growth, "floor": self.floor, "own": a.own}
        return f"AutoDamping({', '.join(f'{name}={value:g}' for name, value in given.items())})"


class BatchRelative(Damping):
    """``c * mean_j |g_j|^2``, which is ``c m`` times the scale of the per-sample Fisher: that of SoftNormalization.

    Where all gradients of a batch are zero but for rounding, the mean is bounded below by what is rounding against the
    batches before.

    Args:
        ratio: c m.
        slow: the slow mean of the scale, which goes on from step to step.
    """

    bounded = True

    def __init__(self, ratio: float, slow: RunningMean) -> None:
        self.ratio = ratio
        self._slow = slow

    def value(self, scale: Tensor) -> Tensor:
        slow = self._slow.update_finite(scale, _SLOW_DECAY)  # that of a batch alone is made finite
        return relative_damping(torch.maximum(scale, _ROUNDING * slow), self.ratio)


def relative_damping(scale: Tensor, ratio: float) -> Tensor:
    """``ratio * scale``, and always more than zero.

    A zero damping would give 0 / 0 where every gradient so far was exactly zero. A step is about one over a gradient:
    where gradients are at the lower end of float32's range, the least damping keeps the step within that range.
    """
    least = max(_LEAST, torch.finfo(scale.dtype).tiny)
    return torch.rsub(scale, least, alpha=-ratio)  # least + ratio * scale, in one operation


def damping_for(rule: Damping, scale: Callable[[], Tensor], like: Tensor, finite: bool = False) -> Tensor:
    """``rule.value(scale())``; the scale is not computed for a rule that does not look at it.

    Args:
        rule: the rule.
        scale: gives the scale of C, no dimensions.
        like: a tensor that decides the device and the dtype.
        finite: whether the scale is known to be finite, as that of a running mean is.
    """
    if not rule.needs_scale:
        return damping_of(rule, torch.empty((), dtype=working_dtype(like.device), device=like.device))
    if finite and rule.takes_finite:
        return rule.value(scale(), finite=True)  # type: ignore[call-arg]
    return damping_of(rule, scale())


def damping_of(rule: Damping, scale: Tensor) -> Tensor:
    """``rule.value(scale)`` as a tensor.

    Raises:
        ArgumentTypeError: a rule of a user's own returns neither a tensor nor a number.
    """
    value = rule.value(scale)
    if isinstance(value, (int, float)):
        return torch.full_like(scale, value)
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(
            f"damping={rule!r}: value(scale) must return a tensor; got {value!r} of type {type(value).__name__}. "
            "Return torch.full_like(scale, number)."
        )
    return value


def resolve_damping(damping: object) -> Damping:
    """A positive number, "auto" or a rule, as a rule."""
    if isinstance(damping, str):
        if damping == "auto":
            return AutoDamping()
        raise ArgumentError(
            f"damping must be a positive number, 'auto' or an instance of npl.Damping; got {damping!r}."
        )
    if isinstance(damping, (int, float)):  # bool included: check_positive refuses it by name
        return Tikhonov(damping)
    if isinstance(damping, Damping):
        return damping
    raise ArgumentTypeError(
        "damping must be a positive number, 'auto' or an instance of npl.Damping (a subclass with a method "
        f"value(scale) -> damping); got {damping!r} of type {type(damping).__name__}."
    )
