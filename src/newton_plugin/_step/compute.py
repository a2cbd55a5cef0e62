"""The steps at all boundaries of a live loss, computed at once by a pass over the loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from newton_plugin._boundary.autograd_graph import Boundary
from newton_plugin._boundary.rows import RowLayout
from newton_plugin._derivatives.autograd import Gradients, Parts, Scaling, loss_gradients
from newton_plugin._derivatives.closed_forms import ClosedForm
from newton_plugin._derivatives.products import hessian_products
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._errors import ShapeError
from newton_plugin._linalg.damped_inverse import HALF, working_dtype
from newton_plugin._linalg.large_rows import inner_products, nonzero_rows, squared_norms
from newton_plugin._runtime.processes import Ranks, current_ranks
from newton_plugin._step.ends import Ends
from newton_plugin._step.rule import StepRule
from newton_plugin._step.senders import all_if_none
from newton_plugin._step.settings import RuleSettings
from newton_plugin._step.size import size_of

__all__ = ["BoundaryStep", "ComputedSteps", "compute_steps", "take_steps"]


@dataclass
class BoundaryStep:
    """The step of one boundary.

    Attributes:
        layout: between the outputs and their rows.
        gradient: per-sample gradients, rows (N, m).
        step: rows (N, m), in the working dtype.
        live: the number of samples of this layer in this loss: rows of all its calls that have a gradient.
        taken: whether the step was taken and not the gradient; None: there was nothing to take.
    """

    layout: RowLayout
    gradient: Tensor
    step: Tensor
    live: Tensor | int
    taken: Tensor | None = None


@dataclass
class ComputedSteps:
    """The steps of one loss at all its boundaries.

    Attributes:
        steps: of each boundary.
        scaling: how the loss is made of its samples.
        parts: what the loss alone sends to its boundaries, times ``seed``.
        seed: of the pass that brought them.
        size: of the whole loss; None: 1.
    """

    steps: list[BoundaryStep]
    scaling: Scaling
    parts: Parts
    seed: float
    size: Tensor | None = None


def take_steps(
    loss: Tensor, boundaries: Sequence[Boundary], rules: Sequence[StepRule], settings: RuleSettings
) -> list[BoundaryStep]:
    """The Newton step at each boundary of a live loss, at once.

    Args:
        loss: one number, or one for each row of a single boundary (an unreduced loss).
        boundaries: where outputs meet the loss.
        rules: one for each boundary; boundaries with the same rule are calls of one layer.
        settings: reduction and feature dimensions.
    """
    return compute_steps(loss, Ends.of(loss, boundaries, rules, settings), settings).steps


def compute_steps(loss: Tensor, ends: Ends, settings: RuleSettings) -> ComputedSteps:
    """The steps at all ends of a loss; see :func:`take_steps`."""
    scaling = _scaling(loss, ends.layouts, settings)
    ranks = current_ranks(settings.sync)
    ranks.agree(ends.describe())
    with torch.autocast(loss.device.type, enabled=False):
        found = loss_gradients(
            loss,
            ends.boundaries,
            ends.samples,
            scaling,
            ends.observed,
            twice="products" in ends.sources,
            verified=all(rule.probing.verified for rule in ends.rules),
        )
        steps: dict[int, BoundaryStep] = {}
        for numbers in ends.calls:
            steps.update(zip(numbers, _steps_of_layer(numbers, found, ends, scaling, ranks), strict=True))
        taken = [steps[k] for k in range(len(steps))]
        size = _in_one_size(taken, ends, ranks) if ends.one_size else None
    return ComputedSteps(taken, scaling, found.parts, found.seed, size)


def _steps_of_layer(
    numbers: Sequence[int], found: Gradients, ends: Ends, scaling: Scaling, ranks: Ranks
) -> list[BoundaryStep]:
    """The steps of all calls of one layer, whose rows are one batch."""
    first = numbers[0]
    rule, source = ends.rules[first], ends.sources[first]
    layouts = [ends.layouts[k] for k in numbers]
    own = [layout.to_rows(found.gradients[k].detach()) for k, layout in zip(numbers, layouts, strict=True)]
    batch = own[0] if len(own) == 1 else torch.cat(own)
    # An empty batch has no curvature; its empty gradient is its step. Other ranks may have samples.
    if not len(batch) and not ranks.many:
        return [BoundaryStep(layout, rows, rows, 1) for layout, rows in zip(layouts, own, strict=True)]
    counted = nonzero_rows(batch).sum()
    live = all_if_none(counted, len(batch))
    if batch.dtype in HALF:  # the step is scaled before it is rounded to them
        streamed = rule.streams(batch) and not ranks.many  # ranks have one dtype, however large their parts are
        batch = batch.to(torch.float32 if streamed else working_dtype(batch.device))
    share = None  # of the rows: a mean over N rows is one over the live rows alone
    if scaling == "mean" and len(batch):
        share = live.to(batch.dtype) / len(batch)
        batch = batch * share
    hessians = None
    if source == "products":
        gradients, boundaries = [found.gradients[k] for k in numbers], [ends.boundaries[k] for k in numbers]
        hessians = hessian_products(gradients, boundaries, layouts, rule.probing, found.cause, share)
    elif source is not None:
        hessians = _closed_forms(numbers, found, ends, share)
    # A rank whose rows are all ignored counts as none in the mean over the ranks.
    result = rule(batch, hessians, ranks, layouts[0].groups, live=counted if ranks.many else live)
    assert result.finiteness.taken is not None
    step = torch.where(result.finiteness.taken, result.step, batch)
    sizes = [layout.rows for layout in layouts]
    parts = zip(layouts, batch.split(sizes), step.split(sizes), strict=True)
    verdict = result.finiteness.taken
    return [BoundaryStep(layout, rows, taken, live, verdict) for layout, rows, taken in parts]


def _closed_forms(numbers: Sequence[int], found: Gradients, ends: Ends, share: Tensor | None) -> SampleHessians | None:
    """The Hessians of all calls of one layer; None where nothing arrives at their operations."""
    parts = []
    for k in numbers:
        source, upstream = ends.sources[k], found.upstream[k]
        if not isinstance(source, ClosedForm) or upstream is None:
            return None
        upstream = upstream.detach().to(working_dtype(upstream.device))
        parts.append(source.hessians(upstream if share is None else upstream * share.to(upstream.dtype)))
    return SampleHessians.joined(parts, [ends.layouts[k].rows for k in numbers])


def _in_one_size(steps: list[BoundaryStep], ends: Ends, ranks: Ranks) -> Tensor:
    """Bring the steps to the one size of their loss; return it. See ``size.py``. Does not wait for the device.

    Where the step of one boundary is not taken, the whole loss keeps its gradient.
    """
    gains, features, verdicts = [], [], []
    for numbers in ends.calls:
        rule, own = ends.rules[numbers[0]], [steps[k] for k in numbers]
        pairs = [(s.gradient.to(s.step.dtype), s.step) for s in own]
        along = torch.stack([inner_products(g, step).sum() for g, step in pairs]).sum()
        squares = torch.stack([squared_norms(g).sum() for g, _ in pairs]).sum()
        sums = torch.stack([along, squares])
        verdict = own[0].taken
        if verdict is not None:
            verdicts.append(verdict)
            sums = torch.where(verdict, sums, math.nan)  # a gradient that was kept says nothing about the rule
        means = ranks.mean(sums, own[0].live)
        gains.append(rule.gain.update(means[0], means[1]))
        features.append(own[0].layout.features)
    taken = torch.stack(verdicts).all() if verdicts else torch.ones_like(gains[0], dtype=torch.bool)
    size, factors = size_of(gains, features, ends.rules[0].power)
    for numbers, factor in zip(ends.calls, factors, strict=True):
        for k in numbers:
            step = steps[k].step if factor is None else steps[k].step * factor
            steps[k].step = torch.where(taken, step, steps[k].gradient)
        ends.rules[numbers[0]].last_factor = None if factor is None else torch.where(taken, factor, 1.0)
    return torch.where(taken, size, 1.0)


def _scaling(loss: Tensor, layouts: Sequence[RowLayout], settings: RuleSettings) -> Scaling:
    if loss.numel() == 1:
        return settings.reduction
    if len(layouts) == 1 and loss.numel() == layouts[0].rows:
        return "per_row"
    raise ShapeError(
        f"the loss must be one number or one for each of the {layouts[0].rows} samples; got shape "
        f"{tuple(loss.shape)}. Reduce it over the features first, e.g. loss.sum(-1)."
    )
