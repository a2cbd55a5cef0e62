"""Hooks on the live graph that send the step into the network where the loss's gradient would have gone.

The operations that use the outputs y *within this loss* are its consumers. The hooks replace what the consumers send
towards y by ``scale * step``: one of them sends all of it, the others send zero. The scale is the gradient that arrives
at the loss itself: 1, or 65536 under a GradScaler, or 1/4 under accumulation. What reaches y by operations outside this
loss (a regulariser, another loss, a deeper head) is added to the step unchanged. The value of the loss stays the user's
own. In float16, whose range is small, the pass may go on from the loss with a seed of ours in place of the scale.

Where operations between the loss and y also serve other terms, the consumers send the sum of both gradients. Two
things keep them apart. At a step at which somebody looks (``sharing.py``), the loss's own part of what each consumer
sends is known from a pass of its own. Once somebody was found to share, the loss's gradient is multiplied by zero where
it starts (or, if terms beside the boundaries need it, its own part is subtracted at the consumers), and the step is
*added* to what the consumers send.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from newton_plugin._boundary.autograd_graph import Boundary, operation
from newton_plugin._derivatives.autograd import Parts
from newton_plugin._errors import NoGradientError, TransformError
from newton_plugin._linalg.damped_inverse import HALF
from newton_plugin._runtime.transforms import batched
from newton_plugin._step.senders import Sender
from newton_plugin._step.sharing import Sharing, separate

__all__ = ["Flow", "splice"]

_MARK = "newton_plugin_splice"


@dataclass(frozen=True)
class Flow:
    """What becomes of the loss's own gradient on its way to the boundaries.

    Attributes:
        size: what everything that flows back from the loss is multiplied by, no dimensions; None: 1.
        own: the loss's own part of what the consumers send, for a loss gradient of 1; None: nobody looks.
        sharing: is told what a look has seen.
        shared: whether other terms are known to use operations of this loss. Then ``own`` is needed where something
            lies beside the boundaries.
        beside: whether the loss reaches anything but its boundaries.
        seed: what flows on from the loss in place of the gradient that arrives there, where nothing lies beside the
            boundaries; None: that gradient. The senders know it.
    """

    size: Tensor | None = None
    own: Parts | None = None
    sharing: Sharing | None = None
    shared: bool = False
    beside: bool = False
    seed: float | None = None


class _Splice:
    """What the hooks of one loss share. It refers to no graph node, so that no circle keeps the graph alive."""

    def __init__(
        self, senders: Sequence[Sender], consumers: Sequence[int], flow: Flow, before: _Splice | None = None
    ) -> None:
        self.before = before  # of another door on the same loss, which runs first and may change the gradient there
        self.senders = senders
        self.consumers = consumers
        self.flow = flow
        self.silent = flow.shared and not flow.beside  # the loss's own gradient serves nothing: it is stopped
        self.scale: Tensor | None = None
        self.task = -1  # the backward pass in which the scale holds; it may have ended by an exception
        self.left: list[int] = []
        self.received: list[Tensor | None] = []
        self.sent: set[int] = set()

    def start(self, scale: Tensor | None) -> Tensor | None:
        """A backward pass begins at the loss, with this gradient. Returns what goes on from there; None: all of it."""
        if scale is None:  # it begins at another output of the operation that made the loss
            return None
        if batched(scale):
            raise TransformError(
                "a backward pass through a hooked loss brings many gradients at once (vmap, is_grads_batched=True, "
                "jacobian(vectorize=True)), and the step is made for one. Take them one after the other, or use "
                "npl.functional.newton_loss, whose step is made with the loss."
            )
        self.task = torch._C._current_graph_task_id()  # type: ignore[attr-defined]
        self.scale = scale.detach() if self.before is None else self.before.scale
        self.left = list(self.consumers)
        self.received = [None] * len(self.senders)
        self.sent.clear()
        torch.autograd.Variable._execution_engine.queue_callback(self.stop)
        if self.silent:
            return torch.zeros_like(scale)
        if self.flow.seed is not None:
            return torch.full_like(scale, self.flow.seed)
        size = self.flow.size
        # In the wider dtype: a size may be beyond half precision where its product with the scale is not.
        return None if size is None else (scale.to(size.dtype) * size).to(scale.dtype)

    def stop(self) -> None:
        """The pass is over: another loss may share operations with this one."""
        self.scale = None
        self.received = []

    def consumer_hook(self, which: int, number: int, positions: Sequence[int], cast: bool) -> Callable[[Any, Any], Any]:
        """A post-hook for consumer ``number`` of boundary ``which``; ``cast``: it only changes the dtype."""

        def hook(
            grad_inputs: tuple[Tensor | None, ...], grad_outputs: tuple[Tensor | None, ...]
        ) -> tuple[Tensor | None, ...] | None:
            if self.scale is None or self.task != torch._C._current_graph_task_id():  # type: ignore[attr-defined]
                return None
            grads = list(grad_inputs)
            here = [k for k, position in enumerate(positions) if grads[position] is not None]
            of_others: list[Tensor | None] = [None] * len(positions)
            mine: dict[int, Tensor] = {}
            for k in here:
                grad = grads[positions[k]]
                assert grad is not None
                mine[k], of_others[k] = self._separated(grad, which, number, k)
            sender = self.senders[which]
            self.left[which] -= 1
            if sender.waits:
                for grad in mine.values():
                    if cast and self.flow.own is None:
                        grad = _before_rounding(grad, grad_outputs[0])
                    before = self.received[which]
                    self.received[which] = grad.detach() if before is None else before + grad.detach()
                if self.left[which] == 0:
                    self._complete(which, bool(here))
            for k in here:
                sent = self._sent(which, mine[k])
                rest = of_others[k]
                grads[positions[k]] = sent if rest is None else rest if sent is None else sent + rest
            return tuple(grads)

        return hook

    def _sent(self, which: int, like: Tensor) -> Tensor | None:
        """The step, from the first that may send it; nothing from all others."""
        if which in self.sent or self.senders[which].waits:
            return None if self.flow.shared or self.flow.own is not None else torch.zeros_like(like)
        assert self.scale is not None
        self.sent.add(which)
        return self.senders[which].send(self.scale).to(like)

    def _separated(self, grad: Tensor, which: int, number: int, k: int) -> tuple[Tensor, Tensor | None]:
        """What this loss and what others send by a consumer, of which the sum is ``grad``."""
        flow = self.flow
        if self.silent:
            return grad, grad
        own = flow.own[which][number][k] if flow.own is not None else None
        if own is None:
            return (torch.zeros_like(grad), grad) if flow.own is not None else (grad, None)
        assert self.scale is not None
        factor = self.scale.reshape(())
        if flow.size is not None:
            factor = factor.to(flow.size.dtype) * flow.size
        expected = own * factor.to(own)
        if flow.shared:
            return expected, grad - expected
        assert flow.sharing is not None
        return separate(grad, expected, flow.sharing)

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


def splice(loss: Tensor, boundaries: Sequence[Boundary], senders: Sequence[Sender], flow: Flow) -> None:
    """Make every backward pass through ``loss`` send ``senders[k].send(scale)`` into boundary k.

    Of a boundary's consumers the first that runs sends everything. Where the step waits for the gradient itself it is
    the last, whose gradient completes it.

    Args:
        loss: not a leaf.
        boundaries: edges of its graph, none computed from another.
        senders: one for each boundary.
        flow: what becomes of the loss's own gradient.
    """
    assert loss.grad_fn is not None
    marks: dict[Any, Any] = loss.grad_fn.metadata  # type: ignore[assignment]
    mark = (_MARK, loss.output_nr)
    shared = _Splice(senders, [len(boundary.consumers) for boundary in boundaries], flow, marks.get(mark))
    marks[mark] = shared
    for which, boundary in enumerate(boundaries):
        for number, (node, positions) in enumerate(boundary.consumers):
            node.register_hook(shared.consumer_hook(which, number, positions, operation(node) == "ToCopy"))
    loss.register_hook(shared.start)


def _before_rounding(sent: Tensor, arrived: Tensor | None) -> Tensor:
    """What a cast sends to outputs in half precision, as it arrived at the cast: in the dtype of the loss."""
    if arrived is None or sent.dtype not in HALF or arrived.dtype in HALF or arrived.device != sent.device:
        return sent
    return arrived
