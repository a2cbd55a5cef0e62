"""The steps at all boundaries of a live loss, computed at once by a pass over the loss."""

from __future__ import annotations

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
from newton_plugin._linalg.damped_inverse import working_dtype
from newton_plugin._runtime.processes import ProcessGroup, Ranks, current_ranks
from newton_plugin._step.ends import Ends
from newton_plugin._step.exchange import Exchange, telling
from newton_plugin._step.heads import LayerHead
from newton_plugin._step.lagged import LaggedExchange
from newton_plugin._step.one_layer import LayerRows, rows_of_layer, scaling_of_loss, step_of_layer
from newton_plugin._step.rule import StepRule
from newton_plugin._step.settings import RuleSettings
from newton_plugin._step.size import gain_sums, size_of

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
    with telling(loss, settings):
        scaling = scaling_of_loss(loss, ends.layouts, settings)
    ranks = current_ranks(settings.sync)
    exchange: Exchange | LaggedExchange | None = None
    with torch.autocast(loss.device.type, enabled=False):
        if isinstance(ranks, ProcessGroup):
            ranks.settle()
            with telling(loss, settings):
                found, layers = _layers(loss, ends, scaling, True)
            kind = LaggedExchange if settings.sync == "lagged" else Exchange
            with torch.no_grad():
                exchange = kind(layers, ends.describe(), settings, ranks, loss.detach())
            asked: Sequence[Ranks] = exchange.ranks
        else:
            found, layers = _layers(loss, ends, scaling, False)
            asked = [ranks] * len(layers)
        steps: dict[int, BoundaryStep] = {}
        for layer, own in zip(layers, asked, strict=True):
            steps.update(zip(layer.numbers, _steps_of_layer(layer, own), strict=True))
        taken = [steps[k] for k in range(len(steps))]
        size = _in_one_size(taken, ends, exchange) if ends.one_size else None
        if exchange is not None:
            exchange.end()
    return ComputedSteps(taken, scaling, found.parts, found.seed, size)


@dataclass
class _Layer(LayerRows):
    """All calls of one layer, whose rows are one batch.

    Attributes:
        numbers: of its boundaries.
        layouts: of each call.
    """

    numbers: Sequence[int]
    layouts: Sequence[RowLayout]


def _layers(loss: Tensor, ends: Ends, scaling: Scaling, many: bool) -> tuple[Gradients, list[_Layer]]:
    """The gradients of a loss, and the rows of each of its layers."""
    found = loss_gradients(
        loss,
        ends.boundaries,
        ends.samples,
        scaling,
        ends.observed,
        twice="products" in ends.sources,
        verified=all(rule.probing.verified for rule in ends.rules),
    )
    each = zip(ends.calls, ends.heads, strict=True)
    return found, [_layer(numbers, head, found, ends, scaling, many) for numbers, head in each]


def _layer(
    numbers: Sequence[int], head: LayerHead | str | None, found: Gradients, ends: Ends, scaling: Scaling, many: bool
) -> _Layer:
    first = numbers[0]
    rule, source = ends.rules[first], ends.sources[first]
    layouts = [ends.layouts[k] for k in numbers]
    own = [layout.to_rows(found.gradients[k].detach()) for k, layout in zip(numbers, layouts, strict=True)]
    batch = own[0] if len(own) == 1 else torch.cat(own)

    def hessians_of(share: Tensor | None) -> SampleHessians | None:
        if source == "products":
            gradients, boundaries = [found.gradients[k] for k in numbers], [ends.boundaries[k] for k in numbers]
            return hessian_products(gradients, boundaries, layouts, rule.probing, found.cause, share)
        return None if source is None else _closed_forms(numbers, found, ends, share)

    seen = None if isinstance(head, str) else head
    rows = rows_of_layer(rule, batch, scaling, hessians_of, layouts[0].groups, many, seen)
    return _Layer(**vars(rows), numbers=numbers, layouts=layouts)


def _steps_of_layer(layer: _Layer, ranks: Ranks) -> list[BoundaryStep]:
    """The steps of all calls of one layer."""
    step = step_of_layer(layer, ranks)
    sizes = [layout.rows for layout in layer.layouts]
    parts = zip(layer.layouts, step.gradient.split(sizes), step.step.split(sizes), strict=True)
    return [BoundaryStep(layout, rows, taken, step.live, step.taken) for layout, rows, taken in parts]


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


def _in_one_size(steps: list[BoundaryStep], ends: Ends, exchange: Exchange | LaggedExchange | None) -> Tensor:
    """Bring the steps to the one size of their loss; return it. See ``size.py``. Does not wait for the device.

    Where the step of one boundary is not taken, the whole loss keeps its gradient.
    """
    sums, features, verdicts = [], [], []
    for numbers in ends.calls:
        own = [steps[k] for k in numbers]
        verdict = own[0].taken
        if verdict is not None:
            verdicts.append(verdict)
        both = gain_sums([(s.gradient, s.step) for s in own], verdict)
        sums.append(both if exchange is not None else both / own[0].live)
        features.append(own[0].layout.features)
    if exchange is not None:
        device = sums[0].device
        sums = list(exchange.gains(torch.stack([both.to(device) for both in sums])))
    gains = [
        ends.rules[numbers[0]].gain.update(both[0], both[1]) for numbers, both in zip(ends.calls, sums, strict=True)
    ]
    taken = torch.stack(verdicts).all() if verdicts else torch.ones_like(gains[0], dtype=torch.bool)
    size, factors = size_of(gains, features, ends.rules[0].power)
    for numbers, factor in zip(ends.calls, factors, strict=True):
        for k in numbers:
            step = steps[k].step if factor is None else steps[k].step * factor
            steps[k].step = torch.where(taken, step, steps[k].gradient)
        ends.rules[numbers[0]].last_factor = None if factor is None else torch.where(taken, factor, 1.0)
    return torch.where(taken, size, 1.0)
