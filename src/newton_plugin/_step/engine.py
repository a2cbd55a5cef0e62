"""The Newton step of a loss that has already been computed.

Both doors of the package meet here: a wrapped loss function and a hooked loss tensor are the same live graph once the
loss has been evaluated. The package differentiates *that* graph, and not a second evaluation of a function. So dropout
masks and random samples are the same in value, gradient and Hessian, and a loss only has to be differentiable.

A step is made at one of two moments:

* **In the backward pass** (:class:`StepInBackward`): a rule that needs no more than the loss's own gradient (Fisher; a
  Hessian in closed form) reads it as it passes, and differentiates nothing.
* **At once**, by a separate pass over the loss: second derivatives; several processes (collectives inside a backward
  pass might meet those of DDP in another order on each rank); half precision (a seed chosen here keeps gradients from
  underflowing); losses of one number for each sample (whose weights may be zero); and ``on_nonfinite="raise"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from newton_plugin._boundary.autograd_graph import Boundary, mark_preconditioned
from newton_plugin._boundary.rows import RowLayout, layout_of
from newton_plugin._derivatives.autograd import (
    Scaling,
    SinglePassError,
    hessian_products,
    loss_gradients,
    no_second_pass,
)
from newton_plugin._derivatives.closed_forms import ClosedForm, find_closed_form
from newton_plugin._errors import ShapeError
from newton_plugin._linalg.damped_inverse import working_dtype
from newton_plugin._runtime.processes import current_ranks
from newton_plugin._step.rule import StepRule
from newton_plugin._step.senders import ComputedStep, Sender, StepInBackward
from newton_plugin._step.settings import RuleSettings
from newton_plugin._step.splice import splice

__all__ = ["BoundaryStep", "precondition", "take_steps"]

Source = ClosedForm | Literal["products"] | None
"""Where the second derivatives at a boundary come from; None: its rule asks for none."""


@dataclass
class BoundaryStep:
    """The step of one boundary.

    Attributes:
        layout: between the outputs and their rows.
        gradient: per-sample gradients, rows (N, m), in the dtype of the outputs.
        step: rows (N, m), in the working dtype.
    """

    layout: RowLayout
    gradient: Tensor
    step: Tensor


def take_steps(
    loss: Tensor, boundaries: Sequence[Boundary], rules: Sequence[StepRule], settings: RuleSettings
) -> tuple[list[BoundaryStep], Scaling]:
    """The Newton step at each boundary of a live loss, at once.

    Args:
        loss: one number, or one for each row of a single boundary (an unreduced loss).
        boundaries: where outputs meet the loss; each has a curvature of its own.
        rules: one for each boundary.
        settings: reduction and feature dimensions.
    """
    layouts = [layout_of(b.shape, settings.features) for b in boundaries]
    return _compute_steps(loss, boundaries, layouts, _sources(loss, boundaries, layouts, rules), rules, settings)


def precondition(
    loss: Tensor, boundaries: Sequence[Boundary], rules: Sequence[StepRule], settings: RuleSettings
) -> None:
    """Make every backward pass through ``loss`` send the Newton step at each boundary; see :func:`take_steps`."""
    assert loss.grad_fn is not None
    layouts = [layout_of(b.shape, settings.features) for b in boundaries]
    sources = _sources(loss, boundaries, layouts, rules)
    if "products" not in sources and _can_wait(loss, boundaries, layouts, settings):
        senders = _in_backward(layouts, sources, rules, settings)
    else:
        try:
            steps, scaling = _compute_steps(loss, boundaries, layouts, sources, rules, settings)
            senders = [ComputedStep(s.step, s.layout, scaling) for s in steps]
        except SinglePassError as error:
            if not _can_wait(loss, boundaries, layouts, settings):
                raise
            senders = _in_backward(layouts, sources, rules, settings, str(error))
    splice(loss, boundaries, senders)
    mark_preconditioned(loss.grad_fn, [b.graph_edge for b in boundaries])


def _sources(
    loss: Tensor, boundaries: Sequence[Boundary], layouts: Sequence[RowLayout], rules: Sequence[StepRule]
) -> list[Source]:
    """For each boundary: the closed form of the Hessian, if its rule asks for a Hessian and there is one."""
    sources: list[Source] = []
    for boundary, layout, rule in zip(boundaries, layouts, rules, strict=True):
        closed_form = None
        if loss.grad_fn is not None and rule.wants_closed_form(layout.features):
            closed_form = find_closed_form(loss.grad_fn, boundary, layout)
        products = closed_form is None and rule.wants_products(layout.features)
        sources.append("products" if products else closed_form)
    return sources


def _can_wait(
    loss: Tensor, boundaries: Sequence[Boundary], layouts: Sequence[RowLayout], settings: RuleSettings
) -> bool:
    """Whether the steps may be made in the backward pass; the top of this file says why they may not."""
    half = (torch.float16, torch.bfloat16)
    return (
        loss.ndim == 0
        and loss.dtype not in half
        and settings.on_nonfinite == "keep"
        and all(b.dtype not in half and b.certain for b in boundaries)
        and all(layout.rows for layout in layouts)
        and not current_ranks(settings.sync).many
    )


def _in_backward(
    layouts: Sequence[RowLayout],
    sources: Sequence[Source],
    rules: Sequence[StepRule],
    settings: RuleSettings,
    cause: str = "",
) -> list[Sender]:
    """Senders that wait; ``cause``: why there are no Hessian-vector products though a rule asks for them."""
    senders: list[Sender] = []
    for layout, source, rule in zip(layouts, sources, rules, strict=True):
        hessians = source.hessians if isinstance(source, ClosedForm) else None
        if source == "products":
            hessians = lambda _: no_second_pass(cause)  # noqa: E731
        sender = StepInBackward(layout, rule, settings.reduction == "mean", hessians)
        if isinstance(source, ClosedForm):
            source.node.register_hook(sender.record_upstream)
        senders.append(sender)
    return senders


def _compute_steps(
    loss: Tensor,
    boundaries: Sequence[Boundary],
    layouts: Sequence[RowLayout],
    sources: Sequence[Source],
    rules: Sequence[StepRule],
    settings: RuleSettings,
) -> tuple[list[BoundaryStep], Scaling]:
    scaling = _scaling(loss, layouts, settings)
    ranks = current_ranks(settings.sync)
    ranks.agree("; ".join(f"{b.name!r} with {a.features} features" for b, a in zip(boundaries, layouts, strict=True)))
    steps = []
    with torch.autocast(loss.device.type, enabled=False):
        found = loss_gradients(
            loss,
            boundaries,
            layouts,
            scaling,
            [source.node if isinstance(source, ClosedForm) else None for source in sources],
            twice="products" in sources,
            verified=all(rule.probing.verified for rule in rules),
        )
        for k, (boundary, layout, source, rule) in enumerate(zip(boundaries, layouts, sources, rules, strict=True)):
            gradient, upstream = found.gradients[k], found.upstream[k]
            rows = layout.to_rows(gradient.detach())
            hessians = None
            if source == "products":
                hessians = hessian_products(gradient, boundary, layout, rule.probing, found.cause)
            elif source is not None and upstream is not None:
                hessians = source.hessians(upstream.detach().to(working_dtype(upstream.device)))
            # An empty batch has no curvature; its empty gradient is its step. Other ranks may have samples.
            step = rows
            if layout.rows or ranks.many:
                result = rule(rows, hessians, ranks, layout.groups)
                assert result.finiteness.taken is not None
                step = torch.where(result.finiteness.taken, result.step, rows)
            steps.append(BoundaryStep(layout, rows, step))
    return steps, scaling


def _scaling(loss: Tensor, layouts: Sequence[RowLayout], settings: RuleSettings) -> Scaling:
    if loss.numel() == 1:
        return settings.reduction
    if len(layouts) == 1 and loss.numel() == layouts[0].rows:
        return "per_row"
    raise ShapeError(
        f"the loss must be one number or one for each of the {layouts[0].rows} samples; got shape "
        f"{tuple(loss.shape)}. Reduce it over the features first, e.g. loss.sum(-1)."
    )
