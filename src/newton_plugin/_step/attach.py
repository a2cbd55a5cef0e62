"""A loss whose value is the user's, and whose derivative is the step: what the pure engine returns.

Around the outputs y it is ``loss + w (step' d + 1/2 |d|^2)`` with ``d = y - stop(y)``, the quadratic surrogate
``w/2 ||y - z*||^2`` up to a constant. Its value is the loss, its gradient ``w step``, its second derivative ``w I``.
All else that the loss can reach keeps the loss's own derivatives, times the size of the step.

In reverse mode an ``autograd.Function`` says so, at the cost of the step alone. In forward mode, for small outputs
under torch.func, and for the compiler, which fuses what it sees, the formula is written out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_plugin._boundary.rows import RowLayout
from newton_plugin._runtime.transforms import has_graph, in_forward_mode, kinds_of_transforms

__all__ = ["attach_step", "in_size"]

# Numbers up to which torch.func takes longer to enter a Function than to follow the formula. Measured for a step of
# eight members under vmap: formula 2.4 ms, Function 3.1 at 320 numbers a member; 9.4 and 5.5 at 8,192; 65 and 14 at
# 65,536.
_SMALL = 2**11


def attach_step(loss: Tensor, outputs: Tensor, step: Tensor, weight: Tensor | None, layout: RowLayout) -> Tensor:
    """``loss``, whose derivative by ``outputs`` is ``weight * step`` more than it was.

    Args:
        loss: one number, or one for each row.
        outputs: y.
        step: rows (N, m), without a graph.
        weight: of a sample in the loss, no dimensions; None: the loss has one number for each row.
        layout: between the outputs and their rows.
    """
    weight = step.new_ones(()) if weight is None else weight.to(step.dtype)
    per_row = loss.ndim > 0 and loss.numel() == layout.rows and layout.rows > 1
    if torch.compiler.is_compiling() or in_forward_mode() or (outputs.numel() <= _SMALL and kinds_of_transforms()):
        return _written_out(loss, outputs, step, weight, layout, per_row)
    return _Attach.apply(loss, outputs, step, weight, layout, per_row)  # type: ignore[no-any-return]


def in_size(loss: Tensor, size: Tensor) -> Tensor:
    """``loss``, whose derivatives are multiplied by ``size``."""
    if not torch.compiler.is_compiling() and not has_graph(loss):
        return loss
    if torch.compiler.is_compiling() or in_forward_mode():
        stopped = loss.detach()
        moved = (loss - stopped).to(size.dtype) * size
        return torch.where(torch.isfinite(stopped), stopped + moved.to(loss.dtype), loss)
    return _InSize.apply(loss, size)  # type: ignore[no-any-return]


def _written_out(
    loss: Tensor, outputs: Tensor, step: Tensor, weight: Tensor, layout: RowLayout, per_row: bool
) -> Tensor:
    """The surrogate in operations of torch. No 0 times infinity may reach the value."""
    # Zero, and of slope 1; of slope 0 where an output is not finite: -inf is a logit that is masked.
    moved = (outputs - outputs.detach()).nan_to_num(0.0)
    rows = layout.to_rows(moved).to(step.dtype)
    finite = torch.isfinite(step)
    # A step that is not finite is the gradient, which a GradScaler has to see: at 0 the root has an infinite slope, and
    # the root of a square none at all.
    root = torch.where(finite, 1.0, torch.where(torch.isnan(step), rows.square(), rows)).sqrt()
    infinite = torch.where(step < 0, -root, root)
    surrogate = torch.where(finite, step, 0.0) * rows + rows.square() / 2 + (infinite - infinite.detach())
    total = surrogate.sum(-1).reshape(loss.shape) if per_row else surrogate.sum() * weight
    return loss + total.to(loss.dtype)


class _Attach(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(loss: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, outputs, step, weight, ctx.layout, ctx.per_row = inputs
        ctx.save_for_backward(outputs, step, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        outputs, step, weight = ctx.saved_tensors
        held = _Held.apply(step, outputs, ctx.layout) if torch.is_grad_enabled() else step
        scale = gradient.to(step.dtype) * weight
        sent = ctx.layout.from_rows((scale.reshape(-1, 1) if ctx.per_row else scale.reshape(())) * held)
        return gradient, sent.to(outputs.dtype), None, None, None, None


class _Held(torch.autograd.Function):
    """The step, whose derivative by the outputs is 1: the second derivative of the surrogate."""

    generate_vmap_rule = True

    @staticmethod
    def forward(step: Tensor, outputs: Tensor, layout: RowLayout) -> Tensor:  # type: ignore[override]
        return step.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, outputs, ctx.layout = inputs
        ctx.dtype = outputs.dtype

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return None, ctx.layout.from_rows(gradient).to(ctx.dtype), None


class _InSize(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(loss: Tensor, size: Tensor) -> Tensor:  # type: ignore[override]
        return loss.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (size,) = ctx.saved_tensors
        return (gradient.to(size.dtype) * size).to(gradient.dtype), None
