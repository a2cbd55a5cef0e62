r"""Derivatives of a perturbed solver by moving its input in the direction that the loss asks for.

Let p(y) solve a linear problem: ``p(y) = argmax_p <y, p>`` (or argmin). Then ``p = grad_y max_p <y, p>``, and its
smoothed version ``P(y) = E p(y + sigma e)`` is a gradient too, so the Jacobian J of P is *symmetric*. Backpropagation
needs ``J^T w`` for the cotangent w that arrives from the loss. By symmetry that is ``J w``, the derivative of P in the
direction w, and a central difference with common noise gives all its m components at once::

    J w  =  E [ p(y + h w + sigma e) - p(y - h w + sigma e) ] / 2h  +  O(h^2)

(The score-function estimator uses one number, ``<p - b, w>``, from each evaluation.)

The derivative of *this* along v is a difference of differences, and so on. With directions w_1..w_n::

    D(w_1..w_n) = E sum_{signs} (prod_i sign_i) p(y + h sum_i sign_i w_i + sigma e) / (2h)^n

is symmetric and multilinear, up to O(h^2). Its derivative in y along v is ``D(w_1..w_n, v)``; its derivative in w_i
along v is D with v in the place of w_i. So one autograd.Function, whose backward is itself with one more direction,
has derivatives of every order.

In each problem, directions are scaled to root-mean-square one before they are multiplied by ``h = width * sigma``, and
the result is scaled back. So the difference does not depend on the scale of the loss or the size of the batch.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from newton_plugin._runtime.compiler import untraced
from newton_plugin.algorithms._black_box.black_box import BlackBox, features

__all__ = ["smoothed_by_differences"]


def smoothed_by_differences(box: BlackBox, width: float, y: Tensor, noise: Tensor, value: Tensor) -> Tensor:
    """``value``, the mean of the samples, with derivatives by central differences.

    Args:
        box: the solver; samples is even.
        width: h in units of sigma.
        y: problems (N, ...).
        noise: (K, N, ...); the first K/2 are used again for the K/2 pairs of a difference.
        value: the mean of the samples, (N, ...).
    """
    return _Differences.apply(y, noise, value, box, width)  # type: ignore[return-value]


def differences(box: BlackBox, width: float, y: Tensor, noise: Tensor, directions: tuple[Tensor, ...]) -> Tensor:
    """``D(w_1..w_n)``, n >= 1: one call of the solver with ``2^n K/2 N`` problems."""
    half = noise[: max(1, noise.shape[0] // 2)]
    h = width * box.sigma
    signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=len(directions))), dtype=y.dtype, device=y.device)
    sizes = [_root_mean_square(w) for w in directions]
    units = torch.stack([w / torch.where(s > 0, s, 1.0) for w, s in zip(directions, sizes, strict=True)])
    moved = y + h * torch.tensordot(signs, units, dims=1)  # (2^n, N, ...)
    points = box.points(moved.unsqueeze(1), half)
    values = box.solve(points.flatten(0, 1)).unflatten(0, points.shape[:2]).mean(1)
    scale = math.prod(sizes[1:], start=sizes[0]) / (2 * h) ** len(directions)
    return torch.tensordot(signs.prod(-1), values, dims=1) * scale


def _root_mean_square(w: Tensor) -> Tensor:
    """The root-mean-square of each problem, (N, 1, ..., 1)."""
    rows = features(w, 1)
    largest = rows.abs().amax(-1, keepdim=True)
    relative = rows / torch.where(largest > 0, largest, 1.0)  # squares neither overflow nor vanish
    size = largest * relative.square().mean(-1, keepdim=True).sqrt()
    return size.reshape(-1, *[1] * (w.ndim - 1))


@untraced
class _Differences(torch.autograd.Function):
    """``D(w_1..w_n)``; the value itself if there are no directions."""

    @staticmethod
    def forward(y: Tensor, noise: Tensor, value: Tensor, box: BlackBox, width: float, *directions: Tensor) -> Tensor:
        if not directions:
            return value.clone()
        with torch.autocast(y.device.type, enabled=False):
            return differences(box, width, y, noise, directions)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, noise, value, ctx.box, ctx.width, *directions = inputs
        ctx.save_for_backward(y, noise, value, *directions)
        ctx.save_for_forward(y, noise, value, *directions)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (v,) = grad_outputs
        y, noise, value, *directions = ctx.saved_tensors

        def along(*ws: Tensor) -> Tensor:
            return _Differences.apply(y, noise, value, ctx.box, ctx.width, *ws)  # type: ignore[return-value]

        needed = ctx.needs_input_grad
        by_y = along(*directions, v) if needed[0] else None
        by_directions = [
            along(*directions[:i], v, *directions[i + 1 :]) if needed[5 + i] else None for i in range(len(directions))
        ]
        return by_y, None, None, None, None, *by_directions

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        y, noise, value, *directions = ctx.saved_tensors

        def along(*ws: Tensor) -> Tensor:
            return _Differences.apply(y, noise, value, ctx.box, ctx.width, *ws)  # type: ignore[return-value]

        by_y, *by_directions = grad_inputs[0], *grad_inputs[5:]
        terms = [] if by_y is None else [along(*directions, by_y)]
        terms += [along(*directions[:i], t, *directions[i + 1 :]) for i, t in enumerate(by_directions) if t is not None]
        return sum(terms[1:], start=terms[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        y, noise, value, box, width, *directions = args
        copies = info.batch_size

        def fold(tensor: Tensor, dim: int | None, at: int) -> Tensor:
            """The mapped copies as further problems; a tensor that is not mapped is repeated."""
            if dim is None:
                tensor = tensor.unsqueeze(at).expand(*tensor.shape[:at], copies, *tensor.shape[at:])
            else:
                tensor = tensor.movedim(dim, at)
            return tensor.flatten(at, at + 1)

        folded = [fold(w, dim, 0) for w, dim in zip(directions, in_dims[5:], strict=True)]
        shared = (fold(y, in_dims[0], 0), fold(noise, in_dims[1], 1), fold(value, in_dims[2], 0))
        return _Differences.apply(*shared, box, width, *folded).unflatten(0, (copies, -1)), 0  # type: ignore[union-attr]
