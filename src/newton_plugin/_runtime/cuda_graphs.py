"""CUDA graphs: a replay repeats what the device did, so what goes from step to step has to stay where it was.

Outside a capture a running state is replaced at every step, which is one operation less and lets nobody see a tensor
change that he holds. A captured step would then read, at every replay, what the last step before the capture left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin._errors import CaptureError

__all__ = ["capturing", "carried", "refuse_in_a_capture"]


def capturing(tensor: Tensor) -> bool:
    """Whether what is done to ``tensor`` now is recorded in a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def carried(old: Tensor | None, new: Tensor, in_place: bool) -> Tensor:
    """What takes the place of ``old``: ``new``, or ``old`` with the numbers of ``new`` in it.

    Raises:
        CaptureError: ``in_place``, and there is nothing of this shape to write into.
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
    """Raise for what counts its steps in Python.

    Raises:
        CaptureError: a step that keeps its C is being captured.
    """
    if refresh_every > 1 and capturing(like):
        raise CaptureError(
            f"refresh_every={refresh_every} counts steps in Python, which a replay of a CUDA graph does not "
            "run: C would never be computed anew, or always. Use refresh_every=1 in what is captured."
        )
