"""What the transforms of ``torch.func`` and the compiler let a function see.

Inside ``vmap`` a tensor stands for one member of many, and inside ``torch.compile`` for numbers that are not there yet.
Neither can decide a branch of Python. Whatever looks at numbers asks :func:`readable` first, and has another way.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from newton_plugin._errors import NewtonPluginError

__all__ = [
    "batched",
    "exporting",
    "has_graph",
    "has_tangent",
    "in_chunks",
    "in_forward_mode",
    "is_refusal",
    "kinds_of_transforms",
    "outside_transforms",
    "readable",
]

_functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 - no type stubs for it
_dispatch_mode: Any = getattr(torch._C, "_get_dispatch_mode")  # noqa: B009
_modes: Any = getattr(torch._C, "_TorchDispatchModeKey")  # noqa: B009
_TRACERS = (_modes.PROXY, _modes.FAKE)  # make_fx, which linearize uses; tensors without numbers


_REFUSALS = (
    *("setup_context", "forward AD", "forward mode", "vmap", "Batching rule", "batching operators", "data pointer"),
    *("captured Tensor", "single memory location", "ZeroTensors"),
)
"""Parts of the messages in which torch.func says that a function cannot be transformed."""

exporting: Any = getattr(torch.compiler, "is_exporting", lambda: False)  # of torch 2.7
"""Whether ``torch.export`` traces the running code."""


def readable(tensor: Tensor) -> bool:
    """Whether Python may look at the numbers of ``tensor``: neither batched by ``vmap`` nor compiled nor traced."""
    return not torch.compiler.is_compiling() and not batched(tensor) and not any(map(_dispatch_mode, _TRACERS))


def batched(tensor: Tensor) -> bool:
    """Whether ``tensor`` stands for one member of a ``vmap``."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return _functorch.is_legacy_batchedtensor(tensor)


def has_tangent(tensor: Tensor) -> bool:
    """Whether ``tensor`` has a tangent of ``torch.autograd.forward_ad``."""
    return getattr(forward_ad, "_current_level", -1) >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def in_forward_mode() -> bool:
    """Whether tangents may pass: inside of ``jvp``, ``jacfwd``, ``linearize``, or a level of ``forward_ad``."""
    return getattr(forward_ad, "_current_level", -1) >= 0 or "Jvp" in kinds_of_transforms()


def has_graph(tensor: Tensor) -> bool:
    """Whether a derivative of ``tensor`` can be asked for, at any level; not while compiling."""
    if in_forward_mode() or tensor.requires_grad:
        return True
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
        if tensor.requires_grad:
            return True
    return False


def kinds_of_transforms() -> frozenset[str]:
    """The transforms that the running code is inside of: "Vmap", "Grad" (also ``vjp``), "Jvp"; empty if none."""
    stack = _functorch.get_interpreter_stack()
    return frozenset() if not stack else frozenset(interpreter.key().name for interpreter in stack)


def in_chunks() -> bool:
    """Whether the running code is inside of ``vmap(chunk_size=...)``, which calls a function for some members each."""
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_chunked_vmap" and frame.f_globals.get("__name__") == "torch._functorch.vmap":
            return True
        frame = frame.f_back
    return False


def is_refusal(error: BaseException) -> bool:
    """Whether torch.func says by ``error`` that a function cannot be transformed."""
    return not isinstance(error, NewtonPluginError) and any(part in str(error) for part in _REFUSALS)


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Inside, tensors are made as if there were no transform: ``vmap`` refuses random numbers, also our own."""
    if torch.compiler.is_compiling() or not _functorch.get_interpreter_stack():  # the compiler cannot read the stack
        yield
        return
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack  # after torch is complete

    with temporarily_clear_interpreter_stack():
        yield
