"""The Newton step of a loss that has already been computed.

Both doors of the package meet here: a wrapped loss function and a hooked loss tensor are the same live graph once the
loss has been evaluated. The package differentiates *that* graph, and not a second evaluation of a function. So dropout
masks and random samples are the same in value, gradient and Hessian, and a loss only has to be differentiable.

A step is made at one of two moments:

* **In the backward pass** (:class:`StepInBackward`): a rule that needs no more than the loss's own gradient (Fisher; a
  Hessian in closed form) reads it as it passes, and differentiates nothing.
* **At once**, by a separate pass over the loss: second derivatives; one size for several boundaries (``size.py``); one
  layer that is called several times; several processes (collectives inside a backward pass might meet those of DDP in
  another order on each rank); losses of one number for each sample (whose weights may be zero); operations that other
  terms share (``sharing.py``); and ``on_nonfinite="raise"``.

In half precision the gradient of a mean may underflow. bfloat16 has the range of float32, and nothing is done about it.
In float16 the backward pass goes on from the loss with the seed that a pass of its own has, and the step is multiplied
by the scale afterwards. Where the loss's gradient serves something beside the boundaries, a step in float16 is made at
once; in both formats it is at the steps at which somebody looks for terms that share operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from newton_plugin._boundary.autograd_graph import Boundary, is_preconditioned, mark_preconditioned
from newton_plugin._derivatives.autograd import Parts, SinglePassError, own_parts, own_seed
from newton_plugin._derivatives.closed_forms import ClosedForm
from newton_plugin._derivatives.products import no_second_pass
from newton_plugin._linalg.damped_inverse import HALF
from newton_plugin._runtime.cuda_graphs import capturing
from newton_plugin._runtime.processes import current_ranks
from newton_plugin._step.compiled import compiled_step
from newton_plugin._step.compute import compute_steps
from newton_plugin._step.ends import Ends
from newton_plugin._step.exchange import telling
from newton_plugin._step.rule import StepRule
from newton_plugin._step.senders import ComputedStep, Sender, StepInBackward
from newton_plugin._step.settings import RuleSettings
from newton_plugin._step.sharing import Sharing
from newton_plugin._step.splice import Flow, splice

__all__ = ["precondition"]


def precondition(
    loss: Tensor,
    boundaries: Sequence[Boundary],
    rules: Sequence[StepRule],
    settings: RuleSettings,
    beside: bool = False,
    sharing: Sharing | None = None,
) -> None:
    """Make every backward pass through ``loss`` send the Newton step at each boundary; see ``compute.py``.

    Args:
        loss, boundaries, rules, settings: see ``compute.py``.
        beside: whether the loss reaches parameters without passing a boundary.
        sharing: what is known of other terms that use operations of this loss; None: there can be none.
    """
    assert loss.grad_fn is not None
    at = (loss.grad_fn, loss.output_nr)
    again = is_preconditioned(at)
    if again:
        # Another door has changed what flows from this loss, to terms beside the boundaries, too. This one takes its
        # own steps at its own boundaries, and nothing else.
        beside, sharing = False, None
    with telling(loss, settings):
        ends = Ends.of(loss, boundaries, rules, settings, beside)
    shared = look = None
    if sharing is not None and capturing(loss):
        shared = sharing.found  # a CUDA graph can neither wait for a look nor look at some of its replays alone
    elif sharing is not None:
        shared = sharing.read()
        look = sharing if sharing.due() and not shared else None
    waits = not again and _can_wait(loss, ends, settings)
    half = not _formats(loss, ends).isdisjoint(HALF)
    if waits and not shared and "products" not in ends.sources and not (half and look):
        senders, flow = _in_backward(loss, ends, settings, look)
    else:
        try:
            found = compute_steps(loss, ends, settings)
            senders = [ComputedStep(s.step, s.layout, s.live, found.scaling) for s in found.steps]
            own = _scaled(found.parts, 1 / max(found.seed, 1)) if look or (shared and beside) else None
            flow = Flow(found.size if beside else None, own, look, bool(shared), beside)
        except SinglePassError as error:
            if not waits:
                raise
            senders, flow = _in_backward(loss, ends, settings, None, str(error))
    splice(loss, boundaries, senders, flow)
    mark_preconditioned(at, [b.graph_edge for b in boundaries])


def _can_wait(loss: Tensor, ends: Ends, settings: RuleSettings) -> bool:
    """Whether the steps may be made in the backward pass; the top of this file says why they may not."""
    return (
        loss.ndim == 0
        and settings.on_nonfinite == "keep"
        and not ends.one_size
        and len(ends.calls) == len(ends.boundaries)
        and all(b.certain for b in ends.boundaries)
        and not (ends.beside and torch.float16 in _formats(loss, ends))
        and all(layout.rows for layout in ends.layouts)
        and not current_ranks(settings.sync).many
    )


def _formats(loss: Tensor, ends: Ends) -> set[torch.dtype]:
    """The dtypes of the loss and of the outputs at its boundaries."""
    return {loss.dtype, *(boundary.dtype for boundary in ends.boundaries)}


def _in_backward(
    loss: Tensor, ends: Ends, settings: RuleSettings, look: Sharing | None, cause: str = ""
) -> tuple[list[Sender], Flow]:
    """Senders that wait.

    Args:
        loss, ends, settings: the loss, its boundaries, and what was asked for.
        look: is told whether others share operations of the loss; None: nobody looks.
        cause: why there are no Hessian-vector products though a rule asks for them.
    """
    own, upstream = None, [None] * len(ends.boundaries)
    if look is not None:
        try:
            with torch.autocast(loss.device.type, enabled=False):
                own, upstream = own_parts(loss, ends.boundaries, ends.observed)
        except SinglePassError:  # then nobody can look
            look = None
    seed = own_seed(loss, ends.samples, settings.reduction) if torch.float16 in _formats(loss, ends) else None
    compiled = compiled_step(settings)
    senders: list[Sender] = []
    for k, (layout, source, rule) in enumerate(zip(ends.layouts, ends.sources, ends.rules, strict=True)):
        hessians = source.hessians if isinstance(source, ClosedForm) else None
        if source == "products":
            hessians = lambda _: no_second_pass(cause)  # noqa: E731
        arrived = upstream[k]
        known = None if look is None or arrived is None else (arrived, look)
        dtype = ends.boundaries[k].dtype
        head = ends.heads[k]  # each boundary has a rule of its own here
        head = None if isinstance(head, str) else head
        mean = settings.reduction == "mean"
        sender = StepInBackward(layout, rule, mean, hessians, known, dtype, seed, compiled, head)
        if isinstance(source, ClosedForm):
            source.node.register_hook(sender.record_upstream)
        senders.append(sender)
    return senders, Flow(own=own, sharing=look, seed=seed)


def _scaled(parts: Parts, factor: float) -> Parts:
    """What consumers sent, times a number, without its graph."""
    return [[[None if p is None else p.detach() * factor for p in consumer] for consumer in b] for b in parts]
