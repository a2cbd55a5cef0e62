"""How much of the identity is added to the curvature before it is inverted.

``damping -> 0`` is the pure Newton step, ``damping -> infinity`` is the gradient divided by the damping.
A rule is anything with a ``decay`` and a call from the scale of C to a damping; see :class:`Damping`.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError, check_positive

__all__ = ["AutoDamping", "Damping", "Tikhonov", "resolve_damping"]

_HINT = "Larger is safer: damping -> infinity is plain gradient descent."


@runtime_checkable
class Damping(Protocol):
    """A rule for the damping.

    Attributes:
        decay: of the running mean of C that this rule is made for; 0 uses the batch's own C alone.
    """

    decay: float

    def __call__(self, scale: Tensor) -> Tensor:
        """The damping, in units of C: a tensor without dimensions, on the device of ``scale``.

        Args:
            scale: the size of C as one number without dimensions: its root-mean-square eigenvalue.
        """
        ...


class Tikhonov:
    """The same damping at every step, as in the paper: ``(C + damping I)^-1 g``, C of this batch alone.

    Args:
        damping: positive. It has the units of C: of the squared gradient for Fisher, of the second
            derivative for the Hessian; so a value that suits one loss says nothing about another.

    Raises:
        ArgumentError: ``damping <= 0`` or not finite.
        ArgumentTypeError: not a number.
    """

    decay = 0.0

    def __init__(self, damping: float = 0.1) -> None:
        self.damping = check_positive("damping", damping, _HINT)

    def __call__(self, scale: Tensor) -> Tensor:
        return torch.full_like(scale, self.damping)

    def __repr__(self) -> str:
        return f"Tikhonov({self.damping})"


class AutoDamping:
    """Damping relative to C itself: ``damping = ratio * scale(C)``, C a running mean over batches.

    Both sides of the ratio change together when the loss is multiplied by a constant, the outputs change
    their unit or the batch its size, so one ratio serves every loss; nothing needs tuning. The running mean
    matters: relative to a single batch, the step grows without bound where a batch's gradients vanish.

    Override it with a number (``damping=0.1``, fixed, in units of C), with ``AutoDamping(ratio=1.0)`` for a
    more cautious step, or with any object that follows :class:`Damping`.

    Args:
        ratio: damping over the root-mean-square eigenvalue of C. Positive.
        decay: of the running mean of C, in [0, 1).
    """

    def __init__(self, ratio: float = 0.3, decay: float = 0.9) -> None:
        self.ratio = check_positive("ratio", ratio, _HINT)
        if isinstance(decay, bool) or not isinstance(decay, (int, float)):
            raise ArgumentTypeError(f"decay must be a number in [0, 1); got {decay!r}.")
        if not 0 <= decay < 1:
            raise ArgumentError(f"decay must be in [0, 1), 0 for no running mean; got {decay!r}.")
        self.decay = float(decay)

    def __call__(self, scale: Tensor) -> Tensor:
        # The tiny floor only keeps 0 / 0 out where every gradient so far was exactly zero.
        return (self.ratio * scale).clamp_min(torch.finfo(scale.dtype).tiny)

    def __repr__(self) -> str:
        return f"AutoDamping(ratio={self.ratio}, decay={self.decay})"


def resolve_damping(damping: object) -> Damping:
    """A positive number, "auto" or a rule, as a rule."""
    if isinstance(damping, str):
        if damping == "auto":
            return AutoDamping()
        raise ArgumentError(
            f"damping must be a positive number, 'auto' or an object with the Damping protocol; got {damping!r}."
        )
    if isinstance(damping, (int, float)):  # bool included: check_positive refuses it by name
        return Tikhonov(damping)
    if isinstance(damping, Damping) and not isinstance(damping, type):
        return damping
    raise ArgumentTypeError(
        "damping must be a positive number, 'auto' or an object with the Damping protocol (an attribute decay "
        f"and a call scale -> damping); got {damping!r} of type {type(damping).__name__}."
    )
