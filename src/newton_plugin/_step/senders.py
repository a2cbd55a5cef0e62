"""What enters the network in place of a boundary's gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from newton_plugin._boundary.rows import RowLayout
from newton_plugin._derivatives.autograd import (
    Scaling,
)
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._linalg.damped_inverse import working_dtype
from newton_plugin._step.rule import StepRule

__all__ = ["Sender"]


class Sender(Protocol):
    """What takes the place of one boundary's gradient. It refers to no graph node: a node that owned its owner would
    leak.

    Attributes:
        waits: it needs the loss's own gradient of the boundary first, from this backward pass.
    """

    waits: bool

    def receive(self, gradient: Tensor, scale: Tensor) -> None:
        """Take what the loss sends to the boundary, in the boundary's shape, in a pass that began with ``scale``."""
        ...

    def send(self, scale: Tensor) -> Tensor:
        """What enters the network in place of it, in the boundary's shape."""
        ...


class _InBackward:
    """A :class:`Sender` whose step is made of the gradient that the backward pass brings."""

    def __init__(
        self, layout: RowLayout, rule: StepRule, mean: bool, hessians: Callable[[Tensor], SampleHessians] | None
    ) -> None:
        self.waits = True
        self._layout = layout
        self._rule = rule
        self._mean = mean
        self._hessians = hessians
        self._upstream: Tensor | None = None
        self._sent: Tensor | None = None
        self._scale: Tensor | None = None

    def hear(self, _: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> None:
        """A post-hook for the operation whose Hessian is known: what arrives at it."""
        if self.waits and grad_outputs[0] is not None:
            self._upstream = grad_outputs[0].detach()

    def receive(self, gradient: Tensor, scale: Tensor) -> None:
        dtype = working_dtype(gradient.device)
        weight = _weight(scale.to(dtype), self._layout, self._mean)
        hessians = None
        if self._hessians is not None:
            upstream = gradient.new_zeros(()) if self._upstream is None else self._upstream
            hessians = self._hessians(_unweighted(upstream, weight))
        arrived = self._layout.to_rows(gradient)
        # A loss that somebody has multiplied by zero gives 0 / 0: not finite, so nothing is learned from this batch.
        if self._rule.streams(arrived):
            result = self._rule(arrived, hessians, groups=self._layout.groups, weight=weight)
            step = result.step
        else:
            result = self._rule(_unweighted(arrived, weight), hessians, groups=self._layout.groups)
            step = torch.mul(result.step, weight, out=torch.empty_like(arrived))
        assert result.fine is not None
        # What is not fine, or of a loss times zero, goes on as it arrived.
        self._sent = torch.where(result.fine, step, arrived, out=step if step is result.step else None)
        self._scale = scale
        self.waits, self._upstream, self._hessians = False, None, None

    def send(self, scale: Tensor) -> Tensor:
        sent = self._sent
        assert sent is not None
        assert self._scale is not None
        if scale is not self._scale:  # a further pass through a graph that was retained
            sent = sent * (scale.to(working_dtype(sent.device)) / self._scale)
        return self._layout.from_rows(sent)


def _weight(scale: Tensor, layout: RowLayout, mean: bool) -> Tensor:
    """What the gradient that arrives at a loss of one number is, of each sample's own."""
    if scale.ndim:
        scale = scale.reshape(())
    return scale / layout.rows if mean else scale


def _unweighted(gradient: Tensor, weight: Tensor) -> Tensor:
    """``gradient / weight``, in the dtype of the weight (no dimensions)."""
    # With a dimension the weight's dtype counts, and no operation is spent on the conversion.
    return gradient / (weight.reshape(1) if gradient.ndim else weight)


class _AtOnce:
    """A :class:`newton_plugin._step.senders.Sender` whose step is there already."""

    waits = False

    def __init__(self, step: Tensor, layout: RowLayout, scaling: Scaling) -> None:
        self._step = step
        self._layout = layout
        self._scaling = scaling

    def receive(self, gradient: Tensor, scale: Tensor) -> None:
        """Never asked."""

    def send(self, scale: Tensor) -> Tensor:
        scale = scale.to(self._step.dtype)
        if self._scaling == "per_row":
            return self._layout.from_rows(self._step * scale.reshape(-1, 1))
        return self._layout.from_rows(self._step * _weight(scale, self._layout, self._scaling == "mean"))
