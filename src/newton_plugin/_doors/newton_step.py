"""The Newton step in output space, as a function: ``z* = y - (C + damping I)^-1 grad``. Nothing is remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from newton_plugin._boundary.autograd_graph import LossGraph, edge_of, explore, make_boundary
from newton_plugin._boundary.rows import RowLayout
from newton_plugin._curvature.damping import Damping
from newton_plugin._curvature.protocol import Curvature
from newton_plugin._errors import NoGradientError, check_floating
from newton_plugin._runtime.transforms import kinds_of_transforms
from newton_plugin._step.compute import take_steps
from newton_plugin._step.pure import pure_steps
from newton_plugin._step.rule import OnNonfinite
from newton_plugin._step.settings import CurvatureName, Reduction, RuleSettings, StructureChoice
from newton_plugin._step.states import initial_states

__all__ = ["NewtonStep", "newton_step"]


class NewtonStep(NamedTuple):
    """What :func:`newton_step` returns.

    Attributes:
        step: ``(C + damping I)^-power g_i``, in the shape and dtype of the outputs.
        target: ``z* = outputs - step``.
        gradient: ``g_i``, the gradient of each sample's own loss, in the shape of the outputs.
        curvature: C: (m, m), (N, m, m), no dimensions if isotropic; None where it was never formed.
        damping: what was added to it; no dimensions.
    """

    step: Tensor
    target: Tensor
    gradient: Tensor
    curvature: Tensor | None
    damping: Tensor


def newton_step(
    loss_fn: Callable[..., Tensor],
    outputs: Tensor,
    *args: Any,
    curvature: CurvatureName | Curvature = "fisher",
    damping: float | Literal["auto"] | Damping = "auto",
    structure: StructureChoice = "auto",
    power: float = 1,
    reduction: Reduction = "mean",
    feature_dims: int | Sequence[int] | None = None,
    on_nonfinite: OnNonfinite = "raise",
    loss_kwargs: Mapping[str, Any] | None = None,
) -> NewtonStep:
    """One Newton step of ``loss_fn(outputs, *args)`` with respect to ``outputs`` (Petersen et al. 2024, eq. 3).

    Any loss that autograd can differentiate will do: it is evaluated once and its own graph is differentiated, with
    closed forms for ``mse_loss``, ``cross_entropy`` and ``binary_cross_entropy_with_logits``.

    Args:
        loss_fn: returns one number, the mean or sum of the samples' losses, or one number for each sample.
        outputs: y, (N, ...); need not require grad.
        *args: further arguments of ``loss_fn``.
        curvature, damping, structure, power, reduction, feature_dims: see :class:`LossHook`. Nothing is
            remembered from call to call, nothing is shared between processes: damping "auto" is relative to
            this batch's C alone.
        on_nonfinite: "raise", or "keep" to return the gradient as the step.
        loss_kwargs: keyword arguments of ``loss_fn``.

    Raises:
        ShapeError: outputs without a batch dimension; a loss that is neither one number nor one per sample.
        NonFiniteError: NaN or infinite gradients.
        SingularCurvatureError: damping too small to invert C.
        BatchCoupledError: a Hessian is asked for, and the loss mixes the samples of the batch.
        NoGradientError: the loss does not depend on the outputs.
        TransformError: a transform does not let this be done; the message says which.

    It works under ``vmap``, ``grad``, ``jvp`` and ``torch.compile``; the step is a constant of all of them. Where
    nobody can raise and all results are tensors (``vmap``, ``torch.compile``), ``on_nonfinite="raise"`` makes the step
    NaN, and a C that was never formed is NaN.

    Example, a quadratic loss solved in one step:
        >>> import torch, newton_plugin as npl
        >>> y, t = torch.tensor([[3.0, -1.0]]), torch.tensor([[1.0, 1.0]])
        >>> npl.newton_step(torch.nn.functional.mse_loss, y, t, curvature="hessian", damping=1e-9).target
        tensor([[1., 1.]])
    """
    check_floating("outputs", outputs)
    settings = RuleSettings(curvature, damping, structure, power, reduction, feature_dims, on_nonfinite, sync=False)
    layout = RowLayout(tuple(outputs.shape), settings.features)  # before the loss is run
    kwargs = dict(loss_kwargs or {})
    if torch.compiler.is_compiling() or kinds_of_transforms():
        return _pure(lambda ys: loss_fn(ys[0], *args, **kwargs), outputs, settings)
    y = outputs.detach().requires_grad_()
    with torch.enable_grad():
        y = y.clone()  # a loss that works in place may not change a leaf
        edge = edge_of(y)  # before the loss, which may work in place, makes y another tensor
        loss = loss_fn(y, *args, **kwargs)
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise NoGradientError(
            "loss_fn returned a value that does not depend on outputs (no autograd graph). Does it detach them, or "
            "leave torch?"
        )
    assert loss.grad_fn is not None or loss is y
    graph = explore(loss.grad_fn, edge.__eq__) if loss.grad_fn is not None else LossGraph()
    boundary = make_boundary("outputs", edge, graph)
    rule = settings.build()
    (taken,) = take_steps(loss, [boundary], [rule], settings)
    step = layout.from_rows(taken.step.to(outputs.dtype))
    last = rule.last
    return NewtonStep(
        step,
        outputs.detach() - step,
        layout.from_rows(taken.gradient.to(outputs.dtype)),
        None if last is None else last.matrix,
        torch.zeros(()) if last is None else last.damping,
    )


def _pure(loss_of: Callable[[Sequence[Tensor]], Tensor], outputs: Tensor, settings: RuleSettings) -> NewtonStep:
    """The same under transforms and torch.compile. What has no number there is NaN: they return tensors alone."""
    y = {"outputs": outputs.detach()}
    found = pure_steps(
        loss_of, y, lambda derived: initial_states(y, settings, derived.hessians), settings, remembered=False
    )
    (taken,), (layout,), last = found.steps, found.layouts, found.rules[0].last
    step = layout.from_rows(taken.step.to(outputs.dtype)).detach()
    none = torch.full((), torch.nan, dtype=taken.step.dtype, device=outputs.device)
    matrix = none if last is None or last.matrix is None else last.matrix
    return NewtonStep(
        step,
        outputs.detach() - step,
        layout.from_rows(taken.gradient.to(outputs.dtype)),
        matrix,
        torch.zeros_like(none) if last is None else last.damping,
    )
