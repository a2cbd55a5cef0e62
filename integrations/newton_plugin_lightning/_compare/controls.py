"""Two controls that need no package: the parameters' gradient at its usual length, and no longer than usual.

Usual is the root of the running mean of squared norms, decay 0.9, without the bias towards zero of its first steps. The
length is that of the first twenty steps, so that the user's learning rate keeps its meaning.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from newton_plugin_lightning._bases import CallbackBase

__all__ = ["UsualLength"]

_DECAY = 0.9
_FIRST = 20  # steps whose root mean square norm is the length of all later gradients


class UsualLength(CallbackBase):
    """Multiplies the gradient of all parameters of an optimizer by one number.

    Args:
        kind: "normalised": by length / usual. "clipped": by min(1, usual / norm), so that no batch counts for more
            than a usual one.
    """

    def __init__(self, kind: Literal["normalised", "clipped"]) -> None:
        super().__init__()
        self.kind = kind
        self._lengths: dict[int, _Lengths] = {}

    @override
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """After the backward pass and the unscaling, before the Trainer's own clipping."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            lengths = self._lengths.setdefault(id(optimizer), _Lengths())
            norm = torch.linalg.vector_norm(torch.stack([g.norm().float() for g in gradients]))
            factor = lengths.normalised(norm) if self.kind == "normalised" else lengths.clipped(norm)
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.dtype))


class _Lengths:
    """Means of squared norms on the gradient's device. Norms that are not finite (a scaler skips them) are left out."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0  # running sum of squares, and of the weights that they have
        self.weight: Tensor | float = 0.0
        self.first: Tensor | float = 0.0  # the same over the first steps, all of weight one
        self.steps: Tensor | float = 0.0

    def measure(self, norm: Tensor) -> Tensor:
        """The usual norm, that of this step included; NaN before the first finite one."""
        counted = norm.isfinite()
        square, one = torch.where(counted, norm, 0.0).square(), counted.to(norm.dtype)
        self.total = torch.where(counted, _DECAY * self.total + square, self.total)
        self.weight = torch.where(counted, _DECAY * self.weight + one, self.weight)
        early = torch.as_tensor(self.steps < _FIRST).to(norm.dtype)
        self.first, self.steps = self.first + early * square, self.steps + early * one
        return (self.total / self.weight).sqrt()

    def normalised(self, norm: Tensor) -> Tensor:
        usual = self.measure(norm)
        return torch.where(usual > 0, (self.first / self.steps) ** 0.5 / usual, 1.0)

    def clipped(self, norm: Tensor) -> Tensor:
        usual = self.measure(norm)
        return torch.where(norm.isfinite() & (norm > usual), usual / norm, 1.0)
