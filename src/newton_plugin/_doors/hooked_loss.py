"""What a hook has to know of a loss tensor before it looks for boundaries, and what it refuses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from newton_plugin._errors import ArgumentTypeError, NoGradientError, ShapeError, TransformError
from newton_plugin._runtime.cuda_graphs import in_callers_state
from newton_plugin._runtime.transforms import has_tangent, kinds_of_transforms

__all__ = ["check_graph", "check_loss", "check_transforms", "operation_of", "wants_tangent"]


def check_loss(loss: Any) -> None:
    """Raise unless it is one number."""
    if not isinstance(loss, Tensor):
        raise ArgumentTypeError(f"loss must be a torch.Tensor; got {type(loss).__name__}.")
    if loss.numel() != 1:
        raise ShapeError(
            f"loss must be one number; got shape {tuple(loss.shape)}. Reduce it first, or wrap the loss "
            "function by npl.newton_loss, which also takes one loss for each sample."
        )


def check_transforms(loss: Tensor) -> None:
    """Raise under a transform that does not come by the backward pass of this loss."""
    if in_callers_state():
        raise TransformError(
            "LossHook inside of a loss of which npl.functional or a wrapped loss takes the step: a step would be taken "
            "of a step. Hook the whole loss, or none of it."
        )
    if "Vmap" in kinds_of_transforms() or wants_tangent(loss):
        raise TransformError(
            "LossHook changes the backward pass of one computed loss: under vmap there are many, and forward mode "
            "takes no backward pass. Wrap the loss function, npl.newton_loss(loss_fn), or use "
            "npl.functional.newton_loss, whose state is an argument."
        )


def check_graph(loss: Tensor) -> None:
    """Raise unless there is something to differentiate."""
    if loss.grad_fn is None:
        raise NoGradientError(
            "loss has no autograd graph: it was detached, computed under torch.no_grad(), or every parameter "
            "is frozen; or an operation in it has no gradient (argsort, argmax, round, a comparison). Pass "
            "the loss on which you would call backward(). Losses of rankings: newton_plugin.algorithms."
        )


def operation_of(loss: Tensor) -> str:
    """What made the loss, which tells apart most losses of one layer."""
    return "" if loss.grad_fn is None else loss.grad_fn.name()


def wants_tangent(loss: Tensor) -> bool:
    """Whether a tangent of the loss is asked for, which ``torch.no_grad`` does not forbid."""
    return "Jvp" in kinds_of_transforms() or has_tangent(loss)
