"""The running state of a rule as tensors in dictionaries: made, checked, converted to and from that of a hook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from newton_plugin._boundary.rows import RowLayout, layout_of
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._errors import ArgumentError, ShapeError, TransformError
from newton_plugin._linalg.damped_inverse import working_dtype
from newton_plugin._step.heads import LayerHead
from newton_plugin._step.rule import StepRule
from newton_plugin._step.running_state import filled
from newton_plugin._step.settings import RuleSettings

__all__ = [
    "RuleState",
    "as_tensors",
    "attributes_of",
    "check_attributes",
    "check_form",
    "explicit_rule",
    "initial_states",
    "layout_in",
    "restore",
    "state_from_dict",
    "state_to_dict",
]

_OURS = "newton_plugin."

RuleState = dict[str, Any]
"""The running state of one rule: tensors in dictionaries."""


def layout_in(outputs: Tensor, settings: RuleSettings) -> RowLayout:
    shape = tuple(outputs.shape)
    # The cache: torch.compile warns of it, and sizes that make_fx leaves open have no hash.
    unhashed = torch.compiler.is_compiling() or any(isinstance(size, torch.SymInt) for size in shape)
    return (RowLayout if unhashed else layout_of)(shape, settings.features)


def explicit_rule(settings: RuleSettings) -> StepRule:
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


def initial_states(
    outputs: Mapping[str, Tensor],
    settings: RuleSettings,
    hessians: Sequence[SampleHessians | None] | None = None,
    head: LayerHead | None = None,
) -> list[RuleState]:
    """The states of the rules before the first step of outputs in these shapes.

    Args:
        outputs: by name.
        settings: the rules.
        hessians: of each output, which may decide the form of its state; None: not known.
        head: the last layer below the only output, which may do so, too; None: it is not seen.
    """
    states = []
    for k, y in enumerate(outputs.values()):
        layout, known = layout_in(y, settings), None if hessians is None else hessians[k]
        like = y.new_zeros((), dtype=working_dtype(y.device)).expand(layout.rows, layout.features)
        seen = None if head is None else head.rows(like)
        states.append(as_tensors(explicit_rule(settings).initial_state(like, layout.groups, known, seen), like))
    return states


def restore(rule: StepRule, name: str, state: RuleState) -> None:
    """:meth:`StepRule.restore`; a class of a user's own may work in place on what it is given.

    Raises:
        ArgumentError: a state of other settings, or of several members of a ``vmap``.
    """
    classes = (type(rule.curvature), type(rule.damping))
    if not all(cls.__module__.startswith(_OURS) for cls in classes):
        state = tree_map(torch.clone, state)
    try:
        rule.restore(state)
        fits = state["kept"].ndim == 0
    except (AttributeError, KeyError, TypeError):
        fits = False
    if not fits:
        raise ArgumentError(
            f"the state of outputs={name!r} is none of curvature={rule.curvature!r}, damping={rule.damping!r}, or one "
            "of several members of a vmap. Make one by init(), and call apply() of members under vmap."
        )


def attributes_of(rule: StepRule) -> list[tuple[object, dict[str, Any]]]:
    """What classes of a user's own hold beside the state that they tell; see :func:`check_attributes`."""
    own = [part for part in (rule.curvature, rule.damping) if not _says_its_state(part)]
    return [(part, {name: (value, _version(value)) for name, value in vars(part).items()}) for part in own]


def check_attributes(before: list[tuple[object, dict[str, Any]]]) -> None:
    """Raise :class:`TransformError` where a step has changed an attribute: a pure function forgets it."""
    for part, held in before:
        for name, value in vars(part).items():
            old, version = held.get(name, (None, -1))
            if (old is not value and not _equal(old, value)) or _version(value) != version:
                raise TransformError(
                    f"{type(part).__name__} changes its attribute {name!r} at a step, which a pure function forgets: a "
                    "rule is made anew for each. Give it state_dict(), load_state_dict() and initial_state(), or use a "
                    "hook."
                )


def _says_its_state(part: object) -> bool:
    """Whether it is of ours, or of a class of a user's own that defines ``state_dict``."""
    if type(part).__module__.startswith(_OURS):
        return True
    teller = next(base for base in type(part).__mro__ if "state_dict" in base.__dict__)
    return not teller.__module__.startswith(_OURS)


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _equal(a: Any, b: Any) -> bool:
    return isinstance(a, (bool, int, float, str)) and a == b


def as_tensors(state: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """A state whose leaves are all tensors."""
    made: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            made[name] = as_tensors(value, like)
        elif isinstance(value, Tensor):
            made[name] = value
        else:
            made[name] = torch.as_tensor(value, device=like.device)
    return made


def check_form(name: str, layout: RowLayout, before: RuleState, after: RuleState) -> None:
    """Raise :class:`ShapeError` where a step has changed the form of a state: it was made for other outputs."""
    if _form(before) != _form(after):
        raise ShapeError(
            f"the state of outputs={name!r} does not fit outputs of shape {layout.shape}: it was made by init() for "
            "another shape or other arguments, or the curvature or damping is a class of yours whose initial_state() "
            "is not what state_dict() is after a step. Make one by init() of these outputs. For a compiled step "
            "compile init(), too: the compiler knows no closed form of a Hessian; beyond 128 features its C differs."
        )


def _form(state: dict[str, Any]) -> dict[str, Any]:
    return {name: _form(v) if isinstance(v, dict) else tuple(v.shape) for name, v in state.items()}


def state_to_dict(state: RuleState) -> dict[str, Any]:
    """A state in the form of :meth:`StepRule.state_dict`.

    Raises:
        ArgumentError: a state of several members of a ``vmap``.
    """
    if state["kept"].ndim:
        raise ArgumentError(
            f"state holds {tuple(state['kept'].shape)} members of a vmap; a state_dict is of one. Take that of member "
            "k, torch.utils._pytree.tree_map(lambda t: t[k], state)."
        )
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
    return filled(fresh, saved, _tensor_of)


def _tensor_of(name: str, like: Tensor, given: Any) -> Tensor:
    """What a saved state holds under a name, as a tensor of the caller's own."""
    if not isinstance(given, (Tensor, bool, int, float)):
        raise ArgumentError(
            f"state holds {given!r} of type {type(given).__name__} as {name!r}, which is a number or a tensor. Begin "
            "without it."
        )
    tensor = torch.as_tensor(given).to(like, copy=True)
    if tensor.shape != like.shape:
        raise ArgumentError(
            f"state is one of outputs of another shape: its {name!r} has shape {tuple(tensor.shape)}; these outputs "
            f"need {tuple(like.shape)}. Begin without it."
        )
    return tensor
