"""First and second derivatives of a loss function by ``torch.func``, for its transforms and for ``torch.compile``.

The gradient is a ``torch.func.grad``, a Hessian-vector product the ``vjp`` of that: reverse over reverse, because
forward over reverse fails on mse, huber and margin losses. Products are those of the loss of the whole batch and not of
each sample's loss under ``vmap``, which class weights and ignored rows would make another one. Hessians in closed form
are read off the graph inside the innermost level, where there is one: not while torch.compile traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from newton_plugin._boundary.autograd_graph import differentiable_once, edge_of, explore, make_boundary
from newton_plugin._boundary.rows import RowLayout
from newton_plugin._derivatives.autograd import Scaling, first_line, own_seed
from newton_plugin._derivatives.closed_forms import find_closed_form
from newton_plugin._derivatives.products import no_second_pass
from newton_plugin._derivatives.sample_hessians import HessianUnavailable, SampleHessians
from newton_plugin._errors import NoBoundaryError, NoGradientError, TransformError
from newton_plugin._linalg.damped_inverse import working_dtype
from newton_plugin._linalg.diagonal_rank_one import DiagonalRankOne
from newton_plugin._runtime.transforms import is_refusal

__all__ = ["Differentiated", "Wanted", "differentiate"]

_PIECEWISE_LINEAR = (
    "the gradient does not depend on the outputs (a piecewise linear loss, or one that is differentiable only once)"
)


@dataclass(frozen=True)
class Wanted:
    """What one output's rule asks for.

    Attributes:
        name: of the output, for messages.
        layout: between the output and its rows.
        closed_form: whether a Hessian in closed form is of use.
        products: whether Hessian-vector products are.
    """

    name: str
    layout: RowLayout
    closed_form: bool
    products: bool


@dataclass(frozen=True)
class Differentiated:
    """The derivatives of a loss function at its outputs.

    Attributes:
        value: the loss. Its graph reaches everything but the outputs.
        gradients: per-sample gradients of each output, in its shape.
        hessians: of each output, None where none was asked for.
    """

    value: Tensor
    gradients: list[Tensor]
    hessians: list[SampleHessians | None]


def differentiate(
    loss_of: Callable[[Sequence[Tensor]], Tensor],
    outputs: Sequence[Tensor],
    wanted: Sequence[Wanted],
    scaling_of: Callable[[Tensor], Scaling],
) -> Differentiated:
    """The loss at ``outputs`` and its derivatives, in the scale of ``g_i``.

    Args:
        loss_of: from outputs to the loss.
        outputs: without a graph of their own.
        wanted: of each output.
        scaling_of: from the loss to how it is made of its samples. Raises where it cannot be used.

    Raises:
        NoGradientError: the loss has no gradient.
        TransformError: torch.func cannot transform it.
        NoBoundaryError: the loss does not depend on one of the outputs.
    """
    rows = [w.layout.rows for w in wanted]
    traced = torch.compiler.is_compiling()
    device = outputs[0].device.type
    # The loss runs under the caller's autocast, our passes over it without.
    ambient = (torch.get_autocast_dtype(device),) if torch.is_autocast_enabled(device) else ()
    found: dict[str, Any] = {}  # what is no tensor, from inside of the levels

    def seeded(*inner: Tensor) -> tuple[Tensor, Any]:
        # A loss may work in place.
        at = [y.clone() for y in inner]
        edges = [] if traced else [edge_of(y) for y in at]
        with torch.autocast(device, *ambient) if ambient else nullcontext():
            value = loss_of(at)
        found["scaling"] = scaling = scaling_of(value)
        found["seed"] = seed = own_seed(value, rows, scaling)
        total = value.sum() * seed
        known: dict[int, tuple[Tensor, ...]] = {}
        if not traced:
            if value.grad_fn is None:
                raise NoGradientError(
                    "the loss does not depend on its outputs (no autograd graph). Does the loss function detach them, "
                    "or leave torch?"
                )
            graph = explore(value.grad_fn, set(edges).__contains__)
            for k, (edge, w) in enumerate(zip(edges, wanted, strict=True)):
                boundary = make_boundary(w.name, edge, graph)
                if not boundary.consumers:
                    raise NoBoundaryError(
                        f"the loss does not depend on outputs={w.name!r}, the argument of shape {boundary.shape}. Name "
                        "the argument that holds the model's outputs, outputs=...."
                    )
                form = find_closed_form(value.grad_fn, boundary, w.layout) if w.closed_form else None
                if form is not None:
                    (arrived,) = torch.autograd.grad(total, GradientEdge(form.node, 0), retain_graph=True)
                    hessians = form.hessians(_scaled(arrived.to(working_dtype(arrived.device)), rows[k], seed, scaling))
                    tensors = _tensors_of(hessians)
                    if tensors is not None:
                        known[k] = tensors
        return total, (value, known)

    which = tuple(range(len(outputs)))

    def gradients_of(*inner: Tensor) -> tuple[tuple[Tensor, ...], Any]:
        gradients, aux = torch.func.grad(seeded, argnums=which, has_aux=True)(*inner)
        if not traced:
            found["causes"] = [_why_not_twice(g) for g in gradients]
        return gradients, aux

    pull = None
    try:
        with torch.enable_grad(), torch.autocast(device, enabled=False) if ambient else nullcontext():
            if any(w.products for w in wanted):
                gradients, pull, (value, known) = torch.func.vjp(gradients_of, *outputs, has_aux=True)  # type: ignore[misc]
            else:
                gradients, (value, known) = torch.func.grad(seeded, argnums=which, has_aux=True)(*outputs)
    except RuntimeError as error:
        if not is_refusal(error):
            raise
        raise _refusal(error) from error
    hessians: list[SampleHessians | None] = []
    for k, w in enumerate(wanted):
        if k in known:
            hessians.append(_hessians_of(known[k]))
        elif w.products:
            assert pull is not None
            cause = found.get("causes", [""] * len(wanted))[k]
            factor = _factor(rows[k], found["seed"], found["scaling"])
            hessians.append(no_second_pass(cause) if cause else _products(pull, gradients, k, w.layout, factor))
        else:
            hessians.append(None)
    scaled = [_scaled(g.detach(), rows[k], found["seed"], found["scaling"]) for k, g in enumerate(gradients)]
    return Differentiated(value, scaled, hessians)


def _factor(rows: int, seed: float, scaling: Scaling) -> float:
    """From what a pass with ``seed`` brings to the scale of ``g_i``."""
    if not seed:  # no samples
        return 1.0
    return rows / seed if scaling == "mean" else 1 / seed


def _scaled(tensor: Tensor, rows: int, seed: float, scaling: Scaling) -> Tensor:
    factor = _factor(rows, seed, scaling)
    return tensor if factor == 1 else tensor * factor


def _why_not_twice(gradient: Tensor) -> str:
    """Why a gradient cannot be differentiated again; empty if it can."""
    if not gradient.requires_grad:
        return _PIECEWISE_LINEAR
    return "an operation of the loss is differentiable only once" if differentiable_once(gradient) else ""


def _products(
    pull: Callable[..., Any], gradients: Sequence[Tensor], which: int, layout: RowLayout, factor: float
) -> SampleHessians:
    """Products with the Hessian at one output, from the ``vjp`` of the gradients."""
    zeros = [torch.zeros_like(g) for g in gradients]

    def one(vector: Tensor) -> Tensor:
        vectors = [vector if k == which else zero for k, zero in enumerate(zeros)]
        product = pull(tuple(vectors))[which]
        return product.detach() if factor == 1 else product.detach() * factor

    def hvp(vectors: Tensor) -> Tensor:
        probes = layout.from_rows(vectors).to(gradients[which].dtype)
        try:
            products = torch.func.vmap(one)(probes)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            if torch.compiler.is_compiling():
                raise
            try:  # an operation without a batching rule: one probe at a time
                products = torch.stack([one(probe) for probe in probes])
            except RuntimeError as error:
                raise HessianUnavailable(first_line(error)) from error
        return layout.to_rows(products).to(vectors)

    return SampleHessians(hvp)


def _tensors_of(hessians: SampleHessians) -> tuple[Tensor, ...] | None:
    """Hessians in closed form as tensors, which may leave a level: the blocks, or diagonal, weight and vector."""
    matrices = hessians.diagonal_rank_one
    if matrices is None:
        return None if hessians.blocks is None else (hessians.blocks(),)
    if matrices.weight is None or matrices.vector is None:
        return matrices.diagonal, matrices.diagonal.new_zeros(())
    return matrices.diagonal, matrices.weight, matrices.vector


def _hessians_of(tensors: Sequence[Tensor]) -> SampleHessians:
    """The inverse of :func:`_tensors_of`."""
    detached = [tensor.detach() for tensor in tensors]
    if len(detached) == 1:
        return SampleHessians.of_blocks(lambda: detached[0])
    if len(detached) == 2:
        return SampleHessians.of_rank_one(DiagonalRankOne(detached[0]))
    return SampleHessians.of_rank_one(DiagonalRankOne(*detached))


def _refusal(error: RuntimeError) -> TransformError:
    """The error of torch.func, with what to do where the loss was not written for it."""
    return TransformError(
        f"torch.func cannot transform loss_fn: {first_line(error)} Write it for torch.func: a setup_context and a vmap "
        "rule for its autograd.Functions, torch.where in place of a branch on numbers, nothing in place on tensors "
        "that it was not given; detach what is differentiated in forward mode. Or use npl.newton_loss or npl.LossHook "
        "outside of transforms: they differentiate the loss that was computed."
    )
