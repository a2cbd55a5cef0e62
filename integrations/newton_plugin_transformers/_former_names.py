"""Names that classes had before. They work for programs from then, and say once what to write now."""

from __future__ import annotations

import warnings
from typing import Any

from newton_plugin_transformers._losses import NewtonTrainerLoss

__all__ = ["former"]

_told: set[str] = set()


def former(name: str) -> Any:
    """The class that had this name: ``NewtonLosses`` is now that of Lightning alone.

    Raises:
        AttributeError: no class had it.
    """
    if name != "NewtonLosses":
        raise AttributeError(f"module 'newton_plugin_transformers' has no attribute {name!r}")
    if name not in _told:
        _told.add(name)
        warnings.warn(
            "newton_plugin_transformers.NewtonLosses is called NewtonTrainerLoss now, since NewtonLosses is the "
            "callback of newton_plugin_lightning. The old name will be removed in a later version.",
            DeprecationWarning,
            stacklevel=3,
        )
    return NewtonTrainerLoss
