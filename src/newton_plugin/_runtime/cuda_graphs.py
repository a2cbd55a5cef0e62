"""Running states inside CUDA graphs.

Outside a capture, a step replaces the tensor of a running state by a new one. That is one operation less than writing
into it, and a tensor that somebody holds does not change. A replay, however, repeats what the device did, at the same
addresses: a captured step would read at every replay the tensor that the last step before the capture left. From a
capture on, therefore, steps write the new state into the old tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from newton_plugin._errors import CaptureError

__all__ = ["callers_state", "capturing", "carried", "in_callers_state", "refuse_in_a_capture"]

_CALLERS_STATE: ContextVar[bool] = ContextVar("callers_state", default=False)


@contextmanager
def callers_state() -> Iterator[None]:
    """Inside, running states are the caller's arguments and results: a captured step does not write into them."""
    token = _CALLERS_STATE.set(True)
    try:
        yield
    finally:
        _CALLERS_STATE.reset(token)


def in_callers_state() -> bool:
    """Whether the running code is inside of :func:`callers_state`: a part of a pure step, or the loss that it takes."""
    return _CALLERS_STATE.get()


def capturing(tensor: Tensor) -> bool:
    """Whether operations on ``tensor`` are being recorded in a CUDA graph that has to find its running states again."""
    if torch.compiler.is_compiling() or not tensor.is_cuda or _CALLERS_STATE.get():
        return False
    return torch.cuda.is_current_stream_capturing()


def carried(old: Tensor | None, new: Tensor, in_place: bool) -> Tensor:
    """The running state after a step: ``new`` itself or, ``in_place``, ``old`` with the numbers of ``new``.

    Raises:
        CaptureError: ``in_place``, and ``old`` is None or of another shape, dtype or device.
    """
    if not in_place:
        return new
    if old is None or old.shape != new.shape or old.dtype != new.dtype or old.device != new.device:
        raise CaptureError(
            "a step with a running mean was captured in a CUDA graph before the mean was there: every replay would "
            "begin it anew. Take a step (with outputs of this shape) before the capture, as torch's warm-up does."
        )
    return old.copy_(new)


def refuse_in_a_capture(like: Tensor, refresh_every: int) -> None:
    """Refuse to capture a step that keeps its C: the count of its steps lives in Python, which no replay runs.

    Args:
        like: a tensor on the device of the step.
        refresh_every: steps for which one C is used.

    Raises:
        CaptureError: ``refresh_every`` is more than 1, and the step is being captured.
    """
    if refresh_every > 1 and capturing(like):
        raise CaptureError(
            f"refresh_every={refresh_every} counts steps in Python, which a replay of a CUDA graph does not "
            "run: C would never be computed anew, or always. Use refresh_every=1 in what is captured."
        )
