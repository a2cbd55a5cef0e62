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

from newton_plugin._boundary.rows import RowLayout, layout_of
from newton_plugin._derivatives.autograd import Scaling
from newton_plugin._derivatives.functional import Differentiated, Wanted, differentiate
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._errors import ArgumentError, ArgumentTypeError, ShapeError, TransformError, check_floating
from newton_plugin._linalg.damped_inverse import working_dtype
from newton_plugin._runtime.cuda_graphs import callers_state
from newton_plugin._runtime.processes import ONE_PROCESS
from newton_plugin._step.attach import attach_step, in_size
from newton_plugin._step.one_layer import LayerStep, rows_of_layer, step_of_layer
from newton_plugin._step.rule import StepRule
from newton_plugin._step.settings import RuleSettings
from newton_plugin._step.size import gain_sums, size_of

__all__ = [
    "PureSteps",
    "RuleState",
    "hessians_at",
    "initial_states",
    "preconditioned",
    "pure_steps",
    "state_from_dict",
    "state_to_dict",
]

RuleState = dict[str, Any]
"""The running state of one rule: tensors in dictionaries."""

LossOf = Callable[[Sequence[Tensor]], Tensor]


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
) -> PureSteps:
    """The steps at ``outputs``.

    Args:
        loss_of: from the outputs to the loss: one number, or one for each row of a single output.
        outputs: by name; without a graph of their own.
        states: gives the state of each output's rule, once the derivatives are known.
        settings: the rules.

    Raises:
        ShapeError: a loss of another shape; a state of outputs of another shape.
    """
    rules = [_explicit(settings) for _ in outputs]
    layouts = [_layout(y, settings) for y in outputs.values()]
    found: dict[str, Scaling] = {}

    def scaling_of(loss: Tensor) -> Scaling:
        found["scaling"] = _scaling(loss, layouts, settings)
        return found["scaling"]

    wanted = _wanted(outputs, layouts, rules)
    with nullcontext() if torch.compiler.is_compiling() else callers_state():
        derived = differentiate(loss_of, list(outputs.values()), wanted, scaling_of)
        scaling = found["scaling"]
        before = states(derived)
        steps, after = [], []
        for k, (layout, rule, state) in enumerate(zip(layouts, rules, before, strict=True)):
            rule.restore(state)
            rows, hessians = layout.to_rows(derived.gradients[k]), derived.hessians[k]
            by_share = None if hessians is None else hessians.times
            layer = rows_of_layer(rule, rows, scaling, by_share or (lambda _: None), layout.groups, False)
            steps.append(step_of_layer(layer, ONE_PROCESS))
        size = _in_one_size(steps, layouts, rules)
        for name, layout, rule, state in zip(outputs, layouts, rules, before, strict=True):
            after.append(_as_tensors(rule.tensors(), derived.value))
            _check_form(name, layout, state, after[-1])
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
    return loss


def initial_states(
    outputs: Mapping[str, Tensor], settings: RuleSettings, hessians: Sequence[SampleHessians | None] | None = None
) -> list[RuleState]:
    """The states of the rules before the first step of outputs in these shapes.

    Args:
        outputs: by name.
        settings: the rules.
        hessians: of each output, which may decide the form of its state; None: not known.
    """
    states = []
    for k, y in enumerate(outputs.values()):
        layout, known = _layout(y, settings), None if hessians is None else hessians[k]
        like = y.new_zeros((), dtype=working_dtype(y.device)).expand(layout.rows, layout.features)
        states.append(_as_tensors(_explicit(settings).initial_state(like, layout.groups, known), like))
    return states


def hessians_at(
    loss_of: LossOf, outputs: Mapping[str, Tensor], settings: RuleSettings
) -> Sequence[SampleHessians | None]:
    """The Hessians of a loss at each of its outputs, as a step would use them."""
    rules = [_explicit(settings) for _ in outputs]
    layouts = [_layout(y, settings) for y in outputs.values()]
    if not any(rule.curvature.needs_hessian for rule in rules):
        return [None] * len(rules)
    stopped = [y.detach() for y in outputs.values()]
    wanted = _wanted(outputs, layouts, rules)
    return differentiate(loss_of, stopped, wanted, lambda loss: _scaling(loss, layouts, settings)).hessians


def state_to_dict(state: RuleState) -> dict[str, Any]:
    """A state in the form of :meth:`StepRule.state_dict`."""
    curvature = {
        name: bool(value) if isinstance(value, Tensor) and value.dtype == torch.bool else value
        for name, value in state["curvature"].items()
    }
    return {**state, "curvature": curvature, "structural_fallbacks": 0}


def state_from_dict(saved: dict[str, Any], fresh: RuleState, settings: RuleSettings) -> RuleState:
    """The inverse of :func:`state_to_dict`; also from the state of a rule that has not met all of its tensors.

    Args:
        saved: by :meth:`StepRule.state_dict`.
        fresh: the state before the first step, which stands for what is not in ``saved``.
        settings: the rules.

    Raises:
        ArgumentError: a state of other settings or of outputs of another shape, or one that is not finite.
    """
    settings.build().check_state(saved)
    return _filled(fresh, saved)


def _filled(fresh: RuleState, saved: dict[str, Any]) -> RuleState:
    made: RuleState = {}
    for name, value in fresh.items():
        given = saved.get(name)
        if isinstance(value, dict):
            made[name] = _filled(value, given or {})
        elif given is None:
            made[name] = value
        else:
            tensor = torch.as_tensor(given).to(value, copy=True)
            if tensor.shape != value.shape:
                raise ArgumentError(
                    f"state is one of outputs of another shape: its {name!r} has shape {tuple(tensor.shape)}; these "
                    f"outputs need {tuple(value.shape)}. Begin without it."
                )
            made[name] = tensor
    return made


def _wanted(outputs: Mapping[str, Tensor], layouts: Sequence[RowLayout], rules: Sequence[StepRule]) -> list[Wanted]:
    return [
        Wanted(name, layout, rule.wants_closed_form(layout.features), rule.wants_products(layout.features))
        for name, layout, rule in zip(outputs, layouts, rules, strict=True)
    ]


def _layout(outputs: Tensor, settings: RuleSettings) -> RowLayout:
    make = RowLayout if torch.compiler.is_compiling() else layout_of  # which torch.compile warns of: it has a cache
    return make(tuple(outputs.shape), settings.features)


def _explicit(settings: RuleSettings) -> StepRule:
    """A rule without a state.

    Raises:
        TransformError: its C is kept by a count of steps, which is no tensor.
    """
    rule = settings.build()
    if rule.curvature.refresh_every > 1:
        raise TransformError(
            f"refresh_every={rule.curvature.refresh_every} counts steps in Python, which a pure function cannot: under "
            "torch.func and in npl.functional use refresh_every=1."
        )
    return rule


def _scaling(loss: Any, layouts: Sequence[RowLayout], settings: RuleSettings) -> Scaling:
    if not isinstance(loss, Tensor):
        raise ArgumentTypeError(f"the loss function must return a torch.Tensor; got {type(loss).__name__}.")
    check_floating("the loss", loss)
    if loss.numel() == 1:
        return settings.reduction
    if len(layouts) == 1 and loss.numel() == layouts[0].rows:
        return "per_row"
    raise ShapeError(
        f"the loss must be one number or one for each of the {layouts[0].rows} samples; got shape "
        f"{tuple(loss.shape)}. Reduce it over the features first, e.g. loss.sum(-1)."
    )


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


def _as_tensors(state: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """A state whose leaves are all tensors."""
    made: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            made[name] = _as_tensors(value, like)
        elif isinstance(value, Tensor):
            made[name] = value
        else:
            made[name] = torch.as_tensor(value, device=like.device)
    return made


def _check_form(name: str, layout: RowLayout, before: RuleState, after: RuleState) -> None:
    """Raise :class:`ShapeError` where a step has changed the form of a state: it was made for other outputs."""
    if _form(before) != _form(after):
        raise ShapeError(
            f"the state of outputs={name!r} does not fit outputs of shape {layout.shape}: it was made by init() for "
            "another shape or other arguments, or the curvature or damping is a class of yours whose initial_state() "
            "is not what state_dict() is after a step. Make one by init() of these outputs."
        )


def _form(state: dict[str, Any]) -> dict[str, Any]:
    return {name: _form(v) if isinstance(v, dict) else tuple(v.shape) for name, v in state.items()}
