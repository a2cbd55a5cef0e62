"""Which exact solver runs: the compiled one if it can, or the one in torch."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import Tensor

from newton_plugin._errors import NewtonPluginError

__all__ = ["NumbaMissingError", "compiled"]

_HAS_NUMBA = importlib.util.find_spec("numba") is not None


class NumbaMissingError(NewtonPluginError, ImportError):
    """``backend="numba"`` was asked for and numba is not installed."""


def compiled(backend: str, costs: Tensor) -> Any | None:
    """The module of compiled solvers if this call should use it, else None."""
    if backend == "torch" or (backend == "auto" and costs.device.type != "cpu"):
        return None
    if not _HAS_NUMBA:
        if backend == "auto":
            return None
        raise NumbaMissingError(
            'backend="numba" needs numba, which is not installed: pip install "newton-plugin[algorithms]". '
            'backend="torch" gives the same result with torch alone, more slowly.'
        )
    from newton_plugin.algorithms._shortest_paths import dijkstra_numba  # importing numba takes long

    return dijkstra_numba
