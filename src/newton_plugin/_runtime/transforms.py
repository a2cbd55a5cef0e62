"""What the transforms of ``torch.func`` and the compiler let a function see.

Inside ``vmap`` a tensor stands for one member of many, and inside ``torch.compile`` for numbers that are not there yet.
Neither can decide a branch of Python. Whatever looks at numbers asks :func:`readable` first, and has another way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["kinds_of_transforms", "outside_transforms", "readable"]

_functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 - no type stubs for it


def readable(tensor: Tensor) -> bool:
    """Whether Python may look at the numbers of ``tensor``: neither batched by ``vmap`` nor being compiled."""
    if torch.compiler.is_compiling():
        return False
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return True


def kinds_of_transforms() -> frozenset[str]:
    """The transforms that the running code is inside of: "Vmap", "Grad" (also ``vjp``), "Jvp"; empty if none."""
    stack = _functorch.get_interpreter_stack()
    return frozenset() if not stack else frozenset(interpreter.key().name for interpreter in stack)


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Inside, tensors are made as if there were no transform: ``vmap`` refuses random numbers, also our own."""
    if not _functorch.get_interpreter_stack():
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack  # after torch is complete

    with temporarily_clear_interpreter_stack():
        yield
