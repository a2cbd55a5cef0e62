"""The step of one layer: from the gradients of its rows to what they become, however these gradients were had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from newton_plugin._boundary.rows import RowLayout
from newton_plugin._derivatives.autograd import Scaling
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._errors import ShapeError
from newton_plugin._linalg.damped_inverse import HALF, working_dtype
from newton_plugin._linalg.large_rows import nonzero_rows
from newton_plugin._runtime.processes import Ranks
from newton_plugin._runtime.transforms import readable
from newton_plugin._step.heads import LayerHead
from newton_plugin._step.rows import all_if_none
from newton_plugin._step.rule import StepRule
from newton_plugin._step.settings import RuleSettings

__all__ = ["LayerRows", "LayerStep", "rows_of_layer", "scaling_of_loss", "step_of_layer"]


@dataclass
class LayerRows:
    """The gradients of one layer, as its rule takes them.

    Attributes:
        rule: of the layer.
        batch: rows (N, m), scaled for the samples that count.
        counted: the rows that have a gradient, no dimensions.
        live: the same, or all rows where none has one.
        hessians: their second derivatives.
        groups: rows of one sample.
        head: the last layer below; None: it is not seen, or nobody looks.
    """

    rule: StepRule
    batch: Tensor
    counted: Tensor
    live: Tensor | int
    hessians: SampleHessians | None
    groups: int
    head: LayerHead | None


@dataclass
class LayerStep:
    """The step of all rows of one layer.

    Attributes:
        gradient: per-sample gradients, rows (N, m).
        step: rows (N, m), in the working dtype; the gradient where the step is not taken.
        live: the number of rows that have a gradient; all where none has one.
        taken: whether the step was taken; None: there are no rows.
    """

    gradient: Tensor
    step: Tensor
    live: Tensor | int
    taken: Tensor | None


def rows_of_layer(
    rule: StepRule,
    rows: Tensor,
    scaling: Scaling,
    hessians_of: Callable[[Tensor | None], SampleHessians | None],
    groups: int,
    many: bool,
    head: LayerHead | None = None,
) -> LayerRows:
    """The rows as the rule takes them.

    Args:
        rule: of the layer.
        rows: gradients (N, m) of all its calls, for a mean in the scale of a mean over all N.
        scaling: how the loss is made of its samples.
        hessians_of: from a factor (no dimensions; None: 1) to the samples' Hessians times that factor.
        groups: rows of one sample.
        many: whether several processes share the batch.
        head: the last layer below; None: it is not seen, or the rule does not look.
    """
    counted = nonzero_rows(rows).sum()
    # An empty batch has no curvature; its empty gradient is its step. Other ranks may have samples.
    if not len(rows) and not many:
        return LayerRows(rule, rows, counted, 1, None, groups, head)
    live = all_if_none(counted, len(rows))
    if rows.dtype in HALF:  # the step is scaled before it is rounded to them
        streamed = rule.streams(rows) and not many  # ranks have one dtype, however large their parts are
        rows = rows.to(torch.float32 if streamed else working_dtype(rows.device))
    share = None  # of the rows: a mean over N rows is one over the live rows alone
    if scaling == "mean" and len(rows):
        share = live.to(rows.dtype) / len(rows)
        rows = rows * share
    hessians = hessians_of(share)
    if many and not rule.streams(rows):  # what is named before a step is of the same numbers
        rows = rows.to(working_dtype(rows.device))
    return LayerRows(rule, rows, counted, live, hessians, groups, head)


def step_of_layer(layer: LayerRows, ranks: Ranks) -> LayerStep:
    """From gradients to steps, for the samples of all ``ranks``."""
    rule, rows = layer.rule, layer.batch
    if not len(rows) and not ranks.many:
        return LayerStep(rows, rows, layer.live, None)
    # A rank whose rows are all ignored counts as none in the mean over the ranks.
    live = layer.counted if ranks.many else layer.live
    assert isinstance(live, Tensor)
    result = rule(rows, layer.hessians, ranks, layer.groups, live=live, head=layer.head)
    taken = result.finiteness.taken
    assert taken is not None
    # Where one member of a vmap cannot raise, NaN says it.
    unraised = rule.on_nonfinite == "raise" and not readable(taken)
    step = torch.where(taken, result.step, torch.full_like(rows, torch.nan) if unraised else rows)
    return LayerStep(rows, step, layer.live, taken)


def scaling_of_loss(loss: Tensor, layouts: Sequence[RowLayout], settings: RuleSettings) -> Scaling:
    """How a loss is made of the samples at its boundaries.

    Raises:
        ShapeError: it is neither one number nor one for each row of a single boundary.
    """
    if loss.numel() == 1:
        return settings.reduction
    if len(layouts) == 1 and loss.numel() == layouts[0].rows:
        return "per_row"
    raise ShapeError(
        f"the loss must be one number or one for each of the {layouts[0].rows} samples; got shape "
        f"{tuple(loss.shape)}. Reduce it over the features first, e.g. loss.sum(-1)."
    )
