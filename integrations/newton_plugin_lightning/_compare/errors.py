"""The error of a comparison that cannot go on."""

from newton_plugin import NewtonPluginError

__all__ = ["ComparisonError"]


class ComparisonError(NewtonPluginError, RuntimeError):
    """A comparison cannot go on: the metric is not logged, the training itself fails, or its folder holds another."""
