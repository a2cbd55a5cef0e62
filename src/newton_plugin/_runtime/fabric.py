"""Lightning Fabric's guard, and how the package's own backward passes get past it.

In mixed precision Fabric puts a hook on what a model returns. The hook raises where a backward pass runs outside
``fabric.backward``, as the loss might not have been scaled. Our own passes, which make the curvature, send nothing into
the model and need no scale. Fabric is not imported: where it is not in use, there is no guard.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["past_fabrics_guard"]

_PLACES = ("lightning_fabric.wrappers", "lightning.fabric.wrappers")
_FLAG = "_in_fabric_backward"


@contextmanager
def past_fabrics_guard() -> Iterator[None]:
    """Inside, Fabric takes every backward pass for one of ``fabric.backward``."""
    guards: list[Any] = [sys.modules[name] for name in _PLACES if hasattr(sys.modules.get(name), _FLAG)]
    before = [getattr(guard, _FLAG) for guard in guards]
    for guard in guards:
        setattr(guard, _FLAG, True)
    try:
        yield
    finally:
        for guard, value in zip(guards, before, strict=True):
            setattr(guard, _FLAG, value)
