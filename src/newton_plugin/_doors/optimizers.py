"""What a door can know of the optimizer that takes the steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from newton_plugin._errors import ArgumentTypeError

__all__ = ["is_memoryless"]

_MEMORYLESS = (torch.optim.SGD, torch.optim.ASGD)


def is_memoryless(optimizer: Any) -> bool:
    """Whether an optimizer, or each of several, moves in proportion to its gradients: SGD and ASGD, momentum or not.

    Others divide by what they remember of earlier gradients, as Adam does, or by the gradient's own size.

    Args:
        optimizer: of torch, a wrapper that has one as ``.optimizer`` (Lightning, Accelerate), or several of them.

    Raises:
        ArgumentTypeError: something else.
    """
    several = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
    inner = [_unwrapped(one) for one in several]
    for one in inner:
        if not isinstance(one, torch.optim.Optimizer):
            raise ArgumentTypeError(
                f"optimizer must be a torch.optim.Optimizer or several of them; got {type(one).__name__}. Pass what "
                "takes the steps, or name a size: npl.GatedFisher(size='plain')."
            )
    return bool(inner) and all(isinstance(one, _MEMORYLESS) for one in inner)


def _unwrapped(optimizer: Any) -> Any:
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer
