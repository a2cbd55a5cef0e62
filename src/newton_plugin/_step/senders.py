"""What enters the network in place of a boundary's gradient: a step computed before, or in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from newton_plugin._boundary.rows import RowLayout
from newton_plugin._curvature.protocol import CurvatureStep
from newton_plugin._derivatives.autograd import Scaling
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._linalg.damped_inverse import HALF, working_dtype
from newton_plugin._step.compiled import CompiledStep
from newton_plugin._step.heads import LayerHead
from newton_plugin._step.rows import live_rows
from newton_plugin._step.rule import StepRule
from newton_plugin._step.sharing import Sharing

__all__ = ["ComputedStep", "Sender", "StepInBackward"]


class Sender(Protocol):
    """Sends a step into the network in place of one boundary's gradient.

    It refers to no graph node: the node's hooks refer to it, and such a circle would never be freed.

    Attributes:
        waits: whether it still needs the gradient that the loss sends to the boundary in this backward pass.
    """

    @property
    def waits(self) -> bool: ...

    def receive(self, gradient: Tensor, scale: Tensor) -> None:
        """Make the step from the loss's gradient, in the boundary's shape, in a pass that began with ``scale``."""
        ...

    def send(self, scale: Tensor) -> Tensor:
        """What enters the network, in the boundary's shape."""
        ...


class ComputedStep:
    """A :class:`Sender` whose step has been computed already.

    Args:
        step: rows (N, m).
        layout: between the outputs and their rows.
        samples: over which a mean was taken: the rows of all calls of the layer that have a gradient.
        scaling: how the loss is made of its samples.
    """

    waits = False

    def __init__(self, step: Tensor, layout: RowLayout, samples: Tensor | int, scaling: Scaling) -> None:
        self._step = step
        self._layout = layout
        self._samples = samples
        self._scaling = scaling

    def receive(self, gradient: Tensor, scale: Tensor) -> None:
        """Never called: it does not wait."""

    def send(self, scale: Tensor) -> Tensor:
        scale = scale.to(self._step.dtype)
        if self._scaling == "per_row":
            return self._layout.from_rows(self._step * scale.reshape(-1, 1))
        return self._layout.from_rows(self._step * _weight(scale, self._samples, self._scaling == "mean"))


class StepInBackward:
    """A :class:`Sender` that makes its step from the gradient which the backward pass brings.

    Args:
        layout: between the outputs and their rows.
        rule: from gradients to steps.
        mean: whether the loss is the mean over its samples, and not the sum.
        hessians: from the gradient that arrives at an operation to the Hessians that are known in closed form; or to
            products that raise why there are none.
        own_upstream: what the loss alone sends to that operation, for a loss gradient of 1, and who knows whether
            others send there, too; None: nobody looks.
        dtype: of the outputs; None: that of the gradient that arrives.
        head: the last layer below; None: it is not seen, or the rule does not look.
        seed: with which the pass goes on from the loss, whatever scale arrives there; None: with that scale.
    """

    def __init__(
        self,
        layout: RowLayout,
        rule: StepRule,
        mean: bool,
        hessians: Callable[[Tensor], SampleHessians] | None,
        own_upstream: tuple[Tensor, Sharing] | None = None,
        dtype: torch.dtype | None = None,
        seed: float | None = None,
        compiled: CompiledStep | None = None,
        head: LayerHead | None = None,
    ) -> None:
        self._waits = True
        self._may_wait_again = self._passed = False
        self._compiled = compiled
        self._head = head
        self._dtype = dtype
        self._seed = seed
        self._layout = layout
        self._rule = rule
        self._mean = mean
        self._hessians = hessians
        self._own_upstream = own_upstream
        self._upstream: Tensor | None = None
        self._computed: ComputedStep | None = None
        self._sent: Tensor | None = None
        self._scale: Tensor | None = None

    @property
    def waits(self) -> bool:
        """Of a loss times zero nothing is known: a further pass brings its gradient. Looks at further passes alone."""
        scale = self._scale
        if self._passed and self._may_wait_again and scale is not None and scale.device.type == "cpu":
            self._waits, self._passed = not bool(scale), False
        return self._waits

    def record_upstream(self, _: Sequence[Tensor | None], grad_outputs: Sequence[Tensor | None]) -> None:
        """A post-hook for the operation whose Hessian is known: keeps the gradient that arrives there."""
        if self.waits and grad_outputs[0] is not None:
            self._upstream = grad_outputs[0].detach()

    def receive(self, gradient: Tensor, scale: Tensor) -> None:
        self._scale, self._may_wait_again = scale, self._seed is None and self._hessians is None
        self._make(gradient, scale)
        self._waits, self._upstream, self._hessians, self._own_upstream = False, None, None, None
        if self._head is not None and not (self._may_wait_again and scale.device.type == "cpu" and not bool(scale)):
            self._head = None  # but of a loss times zero a further pass makes the step

    def _make(self, gradient: Tensor, scale: Tensor) -> None:
        """The step, from the gradient that arrives."""
        dtype = working_dtype(gradient.device)
        arrived = self._layout.to_rows(gradient)
        if (
            self._compiled is not None
            and self._hessians is None
            and self._seed is None
            and arrived.dtype == self._dtype
        ):
            sent = self._compiled(self._rule, arrived, scale, self._layout.groups, self._head)
            if sent is not None:
                self._sent = sent
                return
        live = live_rows(arrived)
        seed = self._seed
        factor = None if seed is None else scale.to(dtype).reshape(()) / seed  # of what is sent
        scale_here = scale if seed is None else torch.full_like(scale, seed, dtype=dtype)
        weight = _weight(scale_here.to(dtype), live, self._mean)  # of what arrives
        hessians = None
        if self._hessians is not None:
            upstream = gradient.new_zeros(()) if self._upstream is None else self._upstream
            if self._own_upstream is not None:
                own, sharing = self._own_upstream
                upstream = torch.where(sharing.seen(upstream), own * scale.to(own).reshape(()), upstream)
            hessians = self._hessians(_unweighted(upstream, weight))
        # A loss that was multiplied by zero gives 0 / 0 here: not finite, so this batch changes no running mean.
        groups = self._layout.groups
        if self._rule.streams(arrived, factor):
            if factor is not None and seed is not None and factor.device.type == "cpu" and not bool(factor):
                self._scale = torch.ones_like(scale)  # as of 1: a further pass could not divide by zero
                factor = self._scale.to(factor) / seed
            result = self._rule(
                arrived, hessians, groups=groups, weight=weight, live=live, factor=factor, head=self._head
            )
            sent = _if_taken(result, arrived, factor)
            self._sent = sent if self._dtype is None else sent.to(self._dtype)
        else:
            own = _unweighted(arrived, weight)
            result = self._rule(own, hessians, groups=groups, live=live, head=self._head)
            taken = result.finiteness.taken
            assert taken is not None
            if factor is None and arrived.dtype not in HALF:
                step = torch.mul(result.step, weight, out=torch.empty_like(arrived))
                self._sent = torch.where(taken, step, arrived)
            else:  # rounded once it is scaled, in every further pass, too
                if factor is None:
                    own = torch.where(weight == 0, arrived, own)  # 0, and not 0 / 0
                step = torch.where(taken, result.step, own)
                self._computed = ComputedStep(step, self._layout, live, "mean" if self._mean else "sum")

    def send(self, scale: Tensor) -> Tensor:
        self._passed = True
        assert self._scale is not None
        if self._computed is not None:
            sent = self._computed.send(scale)
            if self._seed is not None or scale is self._scale:
                return sent
            return torch.where(self._scale == 0, torch.nan, sent)  # nothing was known: not a silent zero
        sent = self._sent
        assert sent is not None
        if scale is not self._scale:  # a further pass through a graph that was retained
            sent = sent * (scale.to(working_dtype(sent.device)) / self._scale)
        return self._layout.from_rows(sent)


def _if_taken(result: CurvatureStep, arrived: Tensor, factor: Tensor | None) -> Tensor:
    """The step of rows that are streamed; where it is not taken, the gradient goes on as it arrived."""
    taken, step = result.finiteness.taken, result.step
    assert taken is not None
    if taken.device.type == "cpu" and bool(taken):  # elsewhere a look would wait for the device
        return step
    return torch.where(taken, step, arrived if factor is None else arrived * factor, out=step)


def _weight(scale: Tensor, samples: Tensor | int, mean: bool) -> Tensor:
    """The factor between a sample's own gradient and its part of the gradient that arrives at the boundary."""
    if scale.ndim:
        scale = scale.reshape(())
    return scale / samples if mean else scale


def _unweighted(gradient: Tensor, weight: Tensor) -> Tensor:
    """``gradient / weight``, in the dtype of the weight (no dimensions)."""
    # A weight with a dimension decides the dtype of the result, which saves an operation for the conversion.
    return gradient / (weight.reshape(1) if gradient.ndim else weight)
