"""The step of a loss function as a pure function: states in, states out.

It is the arithmetic of ``compute.py``: the same rules (``rule.py``), the same step of a layer (``one_layer.py``), the
same size (``size.py``). Only the derivatives come from ``torch.func``, and the running state is an argument and a
result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from newton_plugin._boundary.autograd_graph import edge_of, mark_preconditioned
from newton_plugin._boundary.rows import RowLayout
from newton_plugin._derivatives.autograd import Scaling, first_line
from newton_plugin._derivatives.functional import Differentiated, Wanted, differentiate
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._errors import ArgumentTypeError, TransformError, check_floating
from newton_plugin._runtime.cuda_graphs import callers_state, in_callers_state
from newton_plugin._runtime.processes import ONE_PROCESS
from newton_plugin._runtime.transforms import exporting, is_refusal
from newton_plugin._step.attach import attach_step, in_size
from newton_plugin._step.heads import LayerHead
from newton_plugin._step.one_layer import LayerStep, rows_of_layer, scaling_of_loss, step_of_layer
from newton_plugin._step.rule import StepRule
from newton_plugin._step.settings import RuleSettings
from newton_plugin._step.size import gain_sums, size_of
from newton_plugin._step.states import (
    RuleState,
    as_tensors,
    attributes_of,
    check_attributes,
    check_form,
    explicit_rule,
    layout_in,
    restore,
)

__all__ = [
    "PureSteps",
    "hessians_at",
    "preconditioned",
    "pure_steps",
]

LossOf = Callable[[Sequence[Tensor]], Tensor]

# Whether torch.compile, which follows no context variable and traces one function at a time, is inside of a loss.
_TRACED = [False]


@dataclass(frozen=True)
class PureSteps:
    """The steps of one loss at all its outputs.

    Attributes:
        value: the loss. Its graph reaches everything but the outputs.
        scaling: how it is made of its samples.
        layouts: between the outputs and their rows.
        steps: of each output.
        size: of the whole loss; None: 1.
        rules: of each output, after the step.
        states: of the rules.
    """

    value: Tensor
    scaling: Scaling
    layouts: list[RowLayout]
    steps: list[LayerStep]
    size: Tensor | None
    rules: list[StepRule]
    states: list[RuleState]


def pure_steps(
    loss_of: LossOf,
    outputs: Mapping[str, Tensor],
    states: Callable[[Differentiated], Sequence[RuleState]],
    settings: RuleSettings,
    remembered: bool = True,
    head: LayerHead | None = None,
) -> PureSteps:
    """The steps at ``outputs``.

    Args:
        loss_of: from the outputs to the loss: one number, or one for each row of a single output.
        outputs: by name; without a graph of their own.
        states: gives the state of each output's rule, once the derivatives are known.
        settings: the rules.
        remembered: whether there will be another step after the states of this one.
        head: the last layer below the only output; None: it is not seen.

    Raises:
        ShapeError: a loss of another shape; a state of outputs of another shape.
        ArgumentError: a state of other settings.
        TransformError: what runs here was not written for transforms.
    """
    if exporting():
        raise TransformError(
            "torch.export does not record the derivatives of torch.func, which a Newton step is made of. Export the "
            "network without its loss; a step is compiled by torch.compile."
        )
    compiling = torch.compiler.is_compiling()
    traced = _TRACED[0]
    # What is not remembered is a number in the loss, and no step of it.
    if remembered and (traced if compiling else in_callers_state()):
        raise TransformError(
            "a part of this loss already takes a Newton step of its own, of which this one would make another. Wrap "
            "the whole loss, or none of it."
        )
    rules = [explicit_rule(settings) for _ in outputs]
    layouts = [layout_in(y, settings) for y in outputs.values()]
    found: dict[str, Scaling] = {}

    def scaling_of(loss: Tensor) -> Scaling:
        found["scaling"] = _scaling(loss, layouts, settings)
        return found["scaling"]

    wanted = _wanted(outputs, layouts, rules)
    with nullcontext() if compiling else callers_state():
        _TRACED[0] = compiling
        derived = differentiate(loss_of, list(outputs.values()), wanted, scaling_of)
        _TRACED[0] = traced
        scaling = found["scaling"]
        before = states(derived)
        steps, after = [], []
        for k, (name, layout, rule, state) in enumerate(zip(outputs, layouts, rules, before, strict=True)):
            restore(rule, name, state)
            held = [] if compiling or not remembered else attributes_of(rule)
            rows, hessians = layout.to_rows(derived.gradients[k]), derived.hessians[k]
            by_share = None if hessians is None else hessians.times
            steps.append(_step_of_layer(rule, rows, scaling, by_share or (lambda _: None), layout.groups, head))
            check_attributes(held)
        size = _in_one_size(steps, layouts, rules)
        for name, layout, rule, state in zip(outputs, layouts, rules, before, strict=True):
            after.append(as_tensors(rule.tensors(), derived.value))
            if remembered:
                check_form(name, layout, state, after[-1])
    return PureSteps(derived.value, scaling, layouts, steps, size, rules, after)


def preconditioned(found: PureSteps, outputs: Sequence[Tensor]) -> Tensor:
    """The loss, whose derivative by each of ``outputs`` is the step there."""
    loss = found.value if found.size is None else in_size(found.value, found.size)
    for layout, taken, y in zip(found.layouts, found.steps, outputs, strict=True):
        weight: Tensor | None = None
        if found.scaling != "per_row":
            live = taken.live if isinstance(taken.live, Tensor) else torch.full((), taken.live, device=y.device)
            weight = live.to(taken.step.dtype).reciprocal() if found.scaling == "mean" else torch.ones_like(live)
        loss = attach_step(loss, y, taken.step.detach(), weight, layout)
    if not torch.compiler.is_compiling() and loss.grad_fn is not None:
        # For the doors of live graphs: whoever takes this loss leaves it as it is.
        mark_preconditioned((loss.grad_fn, loss.output_nr), [edge_of(y) for y in outputs if y.requires_grad])
    return loss


def hessians_at(
    loss_of: LossOf, outputs: Mapping[str, Tensor], settings: RuleSettings
) -> Sequence[SampleHessians | None]:
    """The Hessians of a loss at each of its outputs, as a step would use them."""
    rules = [explicit_rule(settings) for _ in outputs]
    layouts = [layout_in(y, settings) for y in outputs.values()]
    if not any(rule.curvature.needs_hessian for rule in rules):
        return [None] * len(rules)
    stopped = [y.detach() for y in outputs.values()]
    wanted = _wanted(outputs, layouts, rules)
    return differentiate(loss_of, stopped, wanted, lambda loss: _scaling(loss, layouts, settings)).hessians


def _wanted(outputs: Mapping[str, Tensor], layouts: Sequence[RowLayout], rules: Sequence[StepRule]) -> list[Wanted]:
    return [
        Wanted(name, layout, rule.wants_closed_form(layout.features), rule.wants_products(layout.features))
        for name, layout, rule in zip(outputs, layouts, rules, strict=True)
    ]


def _scaling(loss: Any, layouts: Sequence[RowLayout], settings: RuleSettings) -> Scaling:
    if not isinstance(loss, Tensor):
        raise ArgumentTypeError(f"the loss function must return a torch.Tensor; got {type(loss).__name__}.")
    check_floating("the loss", loss)
    return scaling_of_loss(loss, layouts, settings)


def _step_of_layer(
    rule: StepRule,
    rows: Tensor,
    scaling: Scaling,
    hessians_of: Callable[[Tensor | None], SampleHessians | None],
    groups: int,
    head: LayerHead | None,
) -> LayerStep:
    """:func:`step_of_layer`, where a class of a user's own may not be written for transforms."""
    try:
        return step_of_layer(rows_of_layer(rule, rows, scaling, hessians_of, groups, False, head), ONE_PROCESS)
    except RuntimeError as error:
        if not is_refusal(error):
            raise
        raise TransformError(
            f"torch.func cannot transform the step of curvature={rule.curvature!r} with damping={rule.damping!r}: "
            f"{first_line(error)} Use torch.where in place of a branch on numbers, and no .item() or float(); or take "
            "this step outside of vmap."
        ) from error


def _in_one_size(steps: Sequence[LayerStep], layouts: Sequence[RowLayout], rules: Sequence[StepRule]) -> Tensor | None:
    """Bring the steps to the one size of their loss; return it. What lies beside the outputs is not to be seen."""
    if not any(rule.relative for rule in rules) or any(step.taken is None for step in steps):
        return None
    verdicts = [step.taken for step in steps if step.taken is not None]
    taken = torch.stack(verdicts).all()
    gains = []
    for rule, step in zip(rules, steps, strict=True):
        sums = gain_sums([(step.gradient, step.step)], step.taken)
        gains.append(rule.gain.update(sums[0], sums[1]))
    size, factors = size_of(gains, [layout.features for layout in layouts], rules[0].power)
    for step, factor in zip(steps, factors, strict=True):
        if factor is not None:
            step.step = torch.where(taken, step.step * factor, step.gradient.to(step.step.dtype))
    return torch.where(taken, size, 1.0)
