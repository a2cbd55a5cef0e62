r"""The quadratic surrogate, and how its gradient takes the place of the loss's.

Newton Losses train on ``1/2 ||y - z*||^2`` with ``z* = y - step`` held constant. At y its gradient is ``step``
itself, so the surrogate never has to be evaluated: it is enough that ``step`` flows into the network where
``dL/dy`` would have. The value of the loss stays the user's own.

:func:`splice` does that on the live graph. The operations that use y *within this loss* (its consumers) are told
to send ``scale * step`` towards y: the first that runs sends all of it, the others zero. Whatever else
reaches y (a regulariser, another loss, a deeper head) adds to it untouched. The scale is the gradient that
arrives at the loss itself: 1, or 65536 under a GradScaler, or 1/4 under accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import ShapeError, check_choice, check_floating
from newton_plugin._graph import Boundary

__all__ = ["quadratic_surrogate", "splice"]


def quadratic_surrogate(outputs: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """``1/2 ||y_i - z_i||^2`` summed over features, mean or sum over the samples (Petersen et al. 2024, eq. 2).

    Args:
        outputs: y, (N, ...).
        target: z*, the same shape; treated as a constant.
        reduction: "mean" or "sum" over the N samples.

    Raises:
        ShapeError: shapes differ, or there is no batch dimension.
    """
    check_floating("outputs", outputs)
    check_floating("target", target)
    check_choice("reduction", reduction, ("mean", "sum"))
    if outputs.shape != target.shape or outputs.ndim == 0:
        raise ShapeError(
            "outputs and target must have the same shape (N, ...); got "
            f"{tuple(outputs.shape)} and {tuple(target.shape)}."
        )
    total = (outputs - target.detach()).square().sum() / 2
    return total / outputs.shape[0] if reduction == "mean" else total


class _Splice:
    """What the hooks of one loss share. It refers to no graph node: a node that owned its owner would leak."""

    def __init__(self, replacements: list[Callable[[Tensor], Tensor]]) -> None:
        self.replacements = replacements
        self.scale: Tensor | None = None
        self.sent: set[int] = set()

    def start(self, scale: Tensor) -> None:
        """A backward pass begins at the loss, with this gradient."""
        self.scale = scale
        self.sent.clear()
        # Active in this pass only: another loss may share operations with this one.
        torch.autograd.Variable._execution_engine.queue_callback(self.stop)

    def stop(self) -> None:
        self.scale = None

    def consumer_hook(self, which: int, positions: Sequence[int]) -> Callable[[Any, Any], Any]:
        """A post-hook for one consumer of boundary number ``which``."""

        def hook(grad_inputs: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...] | None:
            if self.scale is None:
                return None
            grads = list(grad_inputs)
            for position in positions:
                grad = grads[position]
                if grad is None:
                    continue
                if which in self.sent:
                    grads[position] = torch.zeros_like(grad)
                else:
                    self.sent.add(which)
                    grads[position] = self.replacements[which](self.scale).to(grad)
            return tuple(grads)

        return hook


def splice(loss: Tensor, boundaries: Sequence[Boundary], replacements: list[Callable[[Tensor], Tensor]]) -> None:
    """Make every backward pass through ``loss`` send ``replacements[k](scale)`` into boundary k.

    Args:
        loss: not a leaf.
        boundaries: edges of its graph, none computed from another.
        replacements: from the gradient that arrives at the loss to the gradient of the boundary, in its shape.
    """
    shared = _Splice(replacements)
    for which, boundary in enumerate(boundaries):
        for node, positions in boundary.consumers:
            node.register_hook(shared.consumer_hook(which, positions))
    loss.register_hook(shared.start)
