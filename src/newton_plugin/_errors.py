"""Every error the package raises on purpose, and the validators that raise them.

A message names the argument, states the rule, shows what was received and says what to do next.
All errors derive from :class:`NewtonPluginError` *and* from the built-in error a caller would expect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

__all__ = [
    "PADDED",
    "ArgumentError",
    "ArgumentTypeError",
    "BatchCoupledError",
    "CaptureError",
    "NewtonPluginError",
    "NoBoundaryError",
    "NoGradientError",
    "NonFiniteError",
    "OutputsTooLargeError",
    "RanksDisagreeError",
    "ShapeError",
    "SingularCurvatureError",
    "TransformError",
    "as_real",
    "check_choice",
    "check_floating",
    "check_positive",
]


class NewtonPluginError(Exception):
    """Base of every error raised on purpose by newton_plugin and its integrations."""


class ArgumentError(NewtonPluginError, ValueError):
    """An argument has a value outside its rule."""


class ArgumentTypeError(NewtonPluginError, TypeError):
    """An argument has the wrong type."""


class ShapeError(NewtonPluginError, ValueError):
    """A tensor has a shape that does not fit."""


class NoGradientError(NewtonPluginError, RuntimeError):
    """The loss or the outputs have no autograd graph, so there is nothing to differentiate."""


class NoBoundaryError(NewtonPluginError, RuntimeError):
    """The place where the model's outputs meet the loss was not found."""


class BatchCoupledError(NewtonPluginError, RuntimeError):
    """The loss mixes the samples of the batch, so per-sample Hessians do not exist."""


class SingularCurvatureError(NewtonPluginError, RuntimeError):
    """``C + damping * I`` could not be inverted."""


class NonFiniteError(NewtonPluginError, RuntimeError):
    """A gradient or a curvature is NaN or infinite."""


class RanksDisagreeError(NewtonPluginError, RuntimeError):
    """The processes of a distributed run take different Newton steps; raised on all of them."""


class CaptureError(NewtonPluginError, RuntimeError):
    """A step that is being captured in a CUDA graph could not be repeated by the replays."""


class TransformError(NewtonPluginError, RuntimeError):
    """A transform (``vmap``, forward mode, a batched backward pass, ``torch.compile``) does not let this be done."""


class OutputsTooLargeError(NewtonPluginError, RuntimeError):
    """A dense curvature of these outputs would not fit in memory."""


PADDED = "Give each sample its own row, torch.nested.to_padded_tensor(...).clone(), before a layer makes the outputs."

# Tracebacks show the name that can be imported.
for _error in (NewtonPluginError, *NewtonPluginError.__subclasses__()):
    _error.__module__ = "newton_plugin"


def check_choice(name: str, value: Any, choices: Sequence[Any], hint: str = "") -> None:
    """Raise :class:`ArgumentError` unless ``value`` is one of ``choices``."""
    if not any(type(value) is type(c) and value == c for c in choices):
        listed = ", ".join(repr(c) for c in choices)
        raise ArgumentError(f"{name} must be one of {listed}; got {value!r}.{' ' + hint if hint else ''}")


def check_positive(name: str, value: Any, hint: str = "") -> float:
    """Return ``value`` as a float; raise unless it is a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(
            f"{name} must be a positive number; got {value!r} of type {type(value).__name__}."
            f"{' ' + hint if hint else ''}"
        )
    if not (value > 0 and math.isfinite(value)):
        raise ArgumentError(f"{name} must be positive and finite; got {value!r}.{' ' + hint if hint else ''}")
    return float(value)


def check_floating(name: str, tensor: Any) -> None:
    """Raise unless ``tensor`` is a real floating-point tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentTypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}.")
    if not tensor.is_floating_point():
        raise ArgumentTypeError(
            f"{name} must have a floating-point dtype; got {tensor.dtype}. "
            + (as_real(name) if tensor.is_complex() else f"Convert it first, e.g. {name}.float().")
        )
    if tensor.is_nested:
        raise ArgumentTypeError(f"{name} must not be a nested tensor. {PADDED}")


def as_real(name: str) -> str:
    """What to do with complex outputs."""
    return f"Compute the loss from real numbers, torch.view_as_real({name}): real and imaginary parts are two features."


def check_range(name: str, value: Any, low: float, high: float) -> float:
    """A number in [low, high), as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name} must be a number in [{low:g}, {high:g}); got {value!r}.")
    if not low <= value < high:
        raise ArgumentError(f"{name} must be in [{low:g}, {high:g}); got {value!r}.")
    return float(value)
