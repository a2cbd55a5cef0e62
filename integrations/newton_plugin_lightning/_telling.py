"""What a Trainer is told in words: by the logger in which it tells its own findings, once, on rank zero."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch

from newton_plugin_lightning._bases import TREES

__all__ = ["tell", "warn_of_lbfgs"]


def tell(trainer: Any, message: str, *args: Any) -> None:
    """Write a line beside those of this Trainer (GPU available, ...), so that it is seen where they are."""
    if trainer.is_global_zero:
        modules = [kind.__module__ for kind in type(trainer).__mro__]
        used = (tree for tree in TREES if any(m.startswith(tree) for m in modules))
        logging.getLogger(next(used, "newton_plugin_lightning")).info(message, *args)


def warn_of_lbfgs(trainer: Any) -> None:
    """Say that a line search looks along another direction than the loss's gradient."""
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
        warnings.warn(
            "NewtonLosses with LBFGS: it compares values of the loss along the gradient, and the gradient is now a "
            "step, not that of the value. Measured, it ends far from where it ends without (docs/choosing.md). "
            "Use a first-order optimizer, or leave the callback out.",
            stacklevel=2,
        )
