"""Lightning Fabric's guard, and how the package's own passes go by it.

In mixed precision Fabric puts a hook on what a model returns, which raises where a backward pass does not run inside
``fabric.backward``, lest somebody forget to scale the loss. The passes that make the curvature send nothing into the
model and need no scale. Nothing is imported: where Fabric is not in use there is no guard.
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
    """Inside, a backward pass counts as one of ``fabric.backward``."""
    guards: list[Any] = [sys.modules[name] for name in _PLACES if hasattr(sys.modules.get(name), _FLAG)]
    before = [getattr(guard, _FLAG) for guard in guards]
    for guard in guards:
        setattr(guard, _FLAG, True)
    try:
        yield
    finally:
        for guard, value in zip(guards, before, strict=True):
            setattr(guard, _FLAG, value)
