"""Hooks on the live graph that send the step into the network where the loss's gradient would have gone.

The operations that use the outputs y *within this loss* are its consumers. The hooks replace what the consumers send
towards y by ``scale * step``: one of them sends all of it, the others send zero. The scale is the gradient that arrives
at the loss itself: 1, or 65536 under a GradScaler, or 1/4 under accumulation. What reaches y by operations outside this
loss (a regulariser, another loss, a deeper head) is added to the step unchanged. The value of the loss stays the user's
own.

A known limit: where two losses share operations between loss and y, the hooks cannot tell their gradients apart. One
backward pass through the sum of both then sends a wrong step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from newton_plugin._boundary.autograd_graph import Boundary
from newton_plugin._errors import NoGradientError
from newton_plugin._step.senders import Sender

__all__ = ["splice"]


class _Splice:
    """What the hooks of one loss share. It refers to no graph node, so that no circle keeps the graph alive."""

    def __init__(self, senders: Sequence[Sender], consumers: Sequence[int]) -> None:
        self.senders = senders
        self.consumers = consumers
        self.scale: Tensor | None = None
        self.left: list[int] = []
        self.received: list[Tensor | None] = []
        self.sent: set[int] = set()

    def start(self, scale: Tensor) -> None:
        """A backward pass begins at the loss, with this gradient."""
        self.scale = scale.detach()
        self.left = list(self.consumers)
        self.received = [None] * len(self.senders)
        self.sent.clear()
        # Active in this pass only: another loss may share operations with this one.
        torch.autograd.Variable._execution_engine.queue_callback(self.stop)

    def stop(self) -> None:
        self.scale = None
        self.received = []

    def consumer_hook(self, which: int, positions: Sequence[int]) -> Callable[[Any, Any], Any]:
        """A post-hook for one consumer of boundary number ``which``."""

        def hook(grad_inputs: tuple[Tensor | None, ...], _: Any) -> tuple[Tensor | None, ...] | None:
            if self.scale is None:
                return None
            grads = list(grad_inputs)
            here = [position for position in positions if grads[position] is not None]
            sender = self.senders[which]
            self.left[which] -= 1
            if sender.waits:
                for position in here:
                    grad, before = grads[position], self.received[which]
                    assert grad is not None
                    self.received[which] = grad.detach() if before is None else before + grad.detach()
                if self.left[which] == 0:
                    self._complete(which, bool(here))
            for position in here:
                grad = grads[position]
                assert grad is not None
                if which in self.sent or sender.waits:
                    grads[position] = torch.zeros_like(grad)
                else:
                    self.sent.add(which)
                    grads[position] = sender.send(self.scale).to(grad)
            return tuple(grads)

        return hook

    def _complete(self, which: int, can_send: bool) -> None:
        """All consumers have run: the gradient of the boundary is known."""
        gradient = self.received[which]
        if gradient is None:
            return  # nothing arrives at the boundary, and nothing is sent
        if not can_send:
            raise NoGradientError(
                "an operation of the loss sends no gradient to the outputs though others do, in an order in which the "
                "step cannot take their place. Use npl.newton_loss, or on_nonfinite='raise', which compute the step "
                "before the backward pass."
            )
        assert self.scale is not None
        self.senders[which].receive(gradient, self.scale)


def splice(loss: Tensor, boundaries: Sequence[Boundary], senders: Sequence[Sender]) -> None:
    """Make every backward pass through ``loss`` send ``senders[k].send(scale)`` into boundary k.

    Of a boundary's consumers the first that runs sends everything. Where the step waits for the gradient itself it is
    the last, whose gradient completes it.

    Args:
        loss: not a leaf.
        boundaries: edges of its graph, none computed from another.
        senders: one for each boundary.
    """
    shared = _Splice(senders, [len(boundary.consumers) for boundary in boundaries])
    for which, boundary in enumerate(boundaries):
        for node, positions in boundary.consumers:
            node.register_hook(shared.consumer_hook(which, positions))
    loss.register_hook(shared.start)
