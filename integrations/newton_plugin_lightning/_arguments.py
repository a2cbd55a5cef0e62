"""The callback's own arguments: their rules, and how ``repr`` shows them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from newton_plugin import ArgumentError, ArgumentTypeError

__all__ = ["check_every", "check_flag", "check_start_step", "check_stop_step", "differing"]


def check_flag(name: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name} must be True or False; got {value!r} of type {type(value).__name__}.")
    return value


def check_start_step(value: Any) -> int:
    """A number of optimizer steps."""
    _check_integer("start_step", value, "an integer")
    if value < 0:
        raise ArgumentError(f"start_step must be 0 (from the beginning) or positive; got {value!r}.")
    return value


def check_stop_step(value: Any, start_step: int) -> int | None:
    """A number of optimizer steps after ``start_step``, or None."""
    if value is None:
        return None
    _check_integer("stop_step", value, "an integer, or None")
    if value <= start_step:
        raise ArgumentError(
            f"stop_step must be larger than start_step={start_step}; got {value!r}, so that no step would be taken. "
            "Take enabled=False for that, or None never to stop."
        )
    return value


def check_every(name: str, value: Any) -> int | None:
    """A positive number of optimizer steps, or None."""
    if value is None:
        return None
    _check_integer(name, value, "an integer, or None")
    if value < 1:
        raise ArgumentError(f"{name} must be a positive number of optimizer steps, or None (never); got {value!r}.")
    return value


def _check_integer(name: str, value: Any, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(
            f"{name} must be a number of optimizer steps, {what}; got {value!r} of type {type(value).__name__}."
        )


def differing(kind: type, values: Mapping[str, Any]) -> str:
    """The arguments of a class that differ from their defaults, as they would be written."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    shown = {k: v for k, v in values.items() if type(v) is not type(defaults.get(k)) or v != defaults.get(k)}
    return ", ".join(f"{name}={value!r}" for name, value in shown.items())
