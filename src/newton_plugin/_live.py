"""The Newton step of a loss that has already been computed.

Both doors of the package meet here: a wrapped loss function and a hooked loss tensor are, once the loss has been
evaluated, the same live graph. Differentiating *that* graph, and not a second evaluation of a function, keeps
dropout masks and random samples the same in value, gradient and Hessian, and asks nothing of the loss but that
autograd can differentiate it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from newton_plugin._curvature import HVP
from newton_plugin._derivatives import Scaling, hessian_products, loss_gradients
from newton_plugin._errors import ShapeError
from newton_plugin._graph import Boundary, mark_preconditioned
from newton_plugin._ranks import current_ranks
from newton_plugin._rows import RowLayout
from newton_plugin._rule import RuleSettings, StepRule
from newton_plugin._surrogate import splice

__all__ = ["BoundaryStep", "precondition", "take_steps"]


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
    loss: Tensor,
    boundaries: Sequence[Boundary],
    rules: Sequence[StepRule],
    settings: RuleSettings,
    hvp: HVP | None = None,
) -> tuple[list[BoundaryStep], Scaling]:
    """The Newton step at each boundary of a live loss.

    Args:
        loss: one number, or one for each row of a single boundary (an unreduced loss).
        boundaries: where outputs meet the loss; each gets a curvature of its own.
        rules: one for each boundary.
        settings: reduction and feature dimensions.
        hvp: a closed form for the Hessian of a single boundary, in place of double backward.
    """
    layouts = [RowLayout(b.shape, settings.features) for b in boundaries]
    scaling = _scaling(loss, layouts, settings)
    twice = settings.needs_hessian and hvp is None
    ranks = current_ranks(settings.sync)
    ranks.agree("; ".join(f"{b.name!r} with {a.features} features" for b, a in zip(boundaries, layouts, strict=True)))
    steps = []
    with torch.autocast(loss.device.type, enabled=False):
        gradients, cause = loss_gradients(
            loss, boundaries, layouts, scaling, twice, verified=all(rule.twice_differentiable for rule in rules)
        )
        for boundary, layout, rule, gradient in zip(boundaries, layouts, rules, gradients, strict=True):
            rows = layout.to_rows(gradient.detach())
            product = hessian_products(gradient, boundary, layout, rule, cause) if twice else hvp
            # An empty batch has no curvature; its empty gradient is its step. Other ranks may have samples.
            step = rule(rows, product, ranks).step if layout.rows or ranks.many else rows
            steps.append(BoundaryStep(layout, rows, step))
    return steps, scaling


def precondition(
    loss: Tensor,
    boundaries: Sequence[Boundary],
    rules: Sequence[StepRule],
    settings: RuleSettings,
    hvp: HVP | None = None,
) -> None:
    """:func:`take_steps`, and make every backward pass through ``loss`` send them."""
    steps, scaling = take_steps(loss, boundaries, rules, settings, hvp)
    splice(loss, boundaries, [_replacement(s.step, s.layout, scaling) for s in steps])
    assert loss.grad_fn is not None
    mark_preconditioned(loss.grad_fn, [(b.edge.node, b.edge.output_nr) for b in boundaries])


def _scaling(loss: Tensor, layouts: Sequence[RowLayout], settings: RuleSettings) -> Scaling:
    if loss.numel() == 1:
        return settings.reduction
    if len(layouts) == 1 and loss.numel() == layouts[0].rows:
        return "per_row"
    raise ShapeError(
        f"the loss must be one number or one for each of the {layouts[0].rows} samples; got shape "
        f"{tuple(loss.shape)}. Reduce it over the features first, e.g. loss.sum(-1)."
    )


def _replacement(step: Tensor, layout: RowLayout, scaling: Scaling) -> Callable[[Tensor], Tensor]:
    """From the gradient that arrives at the loss to the gradient of the outputs."""

    def replacement(scale: Tensor) -> Tensor:
        scale = scale.to(step.dtype)
        if scaling == "per_row":
            return layout.from_rows(step * scale.reshape(-1, 1))
        weight = scale.reshape(()) / layout.rows if scaling == "mean" else scale.reshape(())
        return layout.from_rows(step * weight)

    return replacement
