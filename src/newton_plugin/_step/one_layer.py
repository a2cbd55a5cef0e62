"""The step of one layer: from the gradients of its rows to what they become, however these gradients were had."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from newton_plugin._derivatives.autograd import Scaling
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._linalg.damped_inverse import HALF, working_dtype
from newton_plugin._linalg.large_rows import nonzero_rows
from newton_plugin._runtime.processes import Ranks
from newton_plugin._runtime.transforms import readable
from newton_plugin._step.rows import all_if_none
from newton_plugin._step.rule import StepRule

__all__ = ["LayerStep", "step_of_layer"]


class LayerStep:
    """The step of all rows of one layer.

    Attributes:
        gradient: per-sample gradients, rows (N, m).
        step: rows (N, m), in the working dtype; the gradient where the step is not taken.
        live: the number of rows that have a gradient; all where none has one.
        taken: whether the step was taken; None: there are no rows.
    """

    def __init__(self, gradient: Tensor, step: Tensor, live: Tensor | int, taken: Tensor | None) -> None:
        self.gradient = gradient
        self.step = step
        self.live = live
        self.taken = taken


def step_of_layer(
    rule: StepRule,
    rows: Tensor,
    scaling: Scaling,
    hessians_of: Callable[[Tensor | None], SampleHessians | None],
    ranks: Ranks,
    groups: int,
) -> LayerStep:
    """From gradients to steps.

    Args:
        rule: of the layer.
        rows: gradients (N, m) of all its calls, for a mean in the scale of a mean over all N.
        scaling: how the loss is made of its samples.
        hessians_of: from a factor (no dimensions; None: 1) to the samples' Hessians times that factor.
        ranks: the processes that share the batch.
        groups: rows of one sample.
    """
    # An empty batch has no curvature; its empty gradient is its step. Other ranks may have samples.
    if not len(rows) and not ranks.many:
        return LayerStep(rows, rows, 1, None)
    counted = nonzero_rows(rows).sum()
    live = all_if_none(counted, len(rows))
    if rows.dtype in HALF:  # the step is scaled before it is rounded to them
        rows = rows.to(torch.float32 if rule.streams(rows) else working_dtype(rows.device))
    share = None  # of the rows: a mean over N rows is one over the live rows alone
    if scaling == "mean" and len(rows):
        share = live.to(rows.dtype) / len(rows)
        rows = rows * share
    # A rank whose rows are all ignored counts as none in the mean over the ranks.
    result = rule(rows, hessians_of(share), ranks, groups, live=counted if ranks.many else live)
    taken = result.finiteness.taken
    assert taken is not None
    # Where one member of a vmap cannot raise, NaN says it.
    unraised = rule.on_nonfinite == "raise" and not readable(taken)
    step = torch.where(taken, result.step, torch.full_like(rows, torch.nan) if unraised else rows)
    return LayerStep(rows, step, live, taken)
