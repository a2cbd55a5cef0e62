"""The errors that only bilevel optimization raises, and the checks of its numbers."""

from __future__ import annotations

from typing import Any

from newton_plugin._errors import ArgumentError, ArgumentTypeError, NewtonPluginError

__all__ = [
    "DivergenceWarning",
    "DoubleBackwardError",
    "GradScalerError",
    "NotConvergedError",
    "check_count",
    "check_fraction",
]


class NotConvergedError(NewtonPluginError, RuntimeError):
    """The linear system of the hypergradient was not solved to the tolerance asked for."""


class DoubleBackwardError(NewtonPluginError, RuntimeError):
    """An operation of the lower loss cannot be differentiated twice."""


class GradScalerError(NewtonPluginError, RuntimeError):
    """A GradScaler drives an optimizer that never calls backward."""


class DivergenceWarning(UserWarning):
    """Parameters, or the solution of the linear system, grow without bound; said once for each optimizer."""


def check_count(name: str, value: Any) -> int:
    """Return ``value``; raise unless it is a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name} must be a positive integer; got {value!r} of type {type(value).__name__}.")
    if value < 1:
        raise ArgumentError(f"{name} must be at least 1; got {value}.")
    return value


def check_fraction(name: str, value: Any) -> float:
    """Return ``value`` as a float; raise unless it is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name} must be a number in [0, 1]; got {value!r} of type {type(value).__name__}.")
    if not 0 <= value <= 1:
        raise ArgumentError(f"{name} must lie in [0, 1]; got {value!r}.")
    return float(value)
