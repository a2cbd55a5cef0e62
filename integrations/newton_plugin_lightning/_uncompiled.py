"""A training step as it was before ``torch.compile(module)``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

__all__ = ["Uncompiled"]


class Uncompiled:
    """Gives the eager ``training_step``; ``forward`` stays compiled. Says so at the first one.

    A compiled step is one operation from the batch to the loss, without outputs in between.
    """

    def __init__(self) -> None:
        self._told = False

    def __call__(self, step: Callable[..., Any]) -> Callable[..., Any]:
        eager = getattr(step, "_torchdynamo_orig_callable", None)
        if eager is None:
            return step
        if not self._told:
            self._told = True
            warnings.warn(
                "NewtonLosses calls training_step outside torch.compile, because a compiled one does not show the "
                "outputs that enter the loss. forward() stays compiled: let training_step call self(batch), or compile "
                "the network in it, self.net = torch.compile(net), to keep the speed.",
                stacklevel=2,
            )
        return eager
