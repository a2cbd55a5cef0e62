"""The errors that only bilevel optimization has."""

from __future__ import annotations

from newton_plugin._errors import NewtonPluginError

__all__ = ["DoubleBackwardError", "GradScalerError", "NotConvergedError"]


class NotConvergedError(NewtonPluginError, RuntimeError):
    """The linear system of the hypergradient was not solved to the tolerance asked for."""


class DoubleBackwardError(NewtonPluginError, RuntimeError):
    """An operation of the lower loss cannot be differentiated twice."""


class GradScalerError(NewtonPluginError, RuntimeError):
    """A GradScaler drives an optimizer that never calls backward."""
