"""Grids: their shape, and the neighbours of every vertex in two layouts.

``neighbours`` and ``smallest_around`` are for exact distances: batch first, without gradients. ``around`` is for
loops that are differentiated: batch last, so that it returns a view of contiguous rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from newton_plugin._errors import ShapeError
from newton_plugin._runtime.compiler import untraced

__all__ = ["around", "check_grid", "neighbours", "smallest_around"]


def check_grid(costs: Tensor) -> None:
    """Raise unless ``costs`` are maps (..., h, w) with h, w >= 1."""
    if costs.ndim < 2 or 0 in costs.shape[-2:]:
        raise ShapeError(
            f"costs must have shape (..., h, w) with h, w >= 1; got {tuple(costs.shape)}. "
            "A model that gives one row per map needs .unflatten(-1, (h, w))."
        )


def neighbours(framed: Tensor) -> Tensor:
    """(B, h + 2, w + 2), a grid in a frame of one -> (8, B, h, w): each vertex's neighbours in row-major order."""
    h, w = framed.shape[-2] - 2, framed.shape[-1] - 2
    corners = [(i, j) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    return torch.stack([framed[..., i : i + h, j : j + w] for i, j in corners])


def smallest_around(framed: Tensor) -> Tensor:
    """The minimum over every 3 x 3 square, (..., h + 2, w + 2) -> (..., h, w): rows first, then columns."""
    rows = torch.minimum(torch.minimum(framed[..., :-2, :], framed[..., 1:-1, :]), framed[..., 2:, :])
    return torch.minimum(torch.minimum(rows[..., :-2], rows[..., 1:-1]), rows[..., 2:])


def around(x: Tensor, rows: int, columns: int) -> Tensor:
    """The 3 x 3 square around each of rows x columns vertices: x (h, w, B) -> (3, 3, rows, columns, B), 0 outside of x.

    A view of ``x`` in a frame of zeros, linear and any number of times differentiable. PyTorch's own backward of
    ``Tensor.unfold`` takes twice as long as the nine sums here.
    """
    # torch.compile does not trace a Function with a jvp rule, and compiles the plain operations well.
    return _view(x, rows, columns) if torch.compiler.is_compiling() else _Around.apply(x, rows, columns)


def _view(x: Tensor, rows: int, columns: int) -> Tensor:
    framed = pad(x, (0, 0, 1, columns - x.shape[1] + 1, 1, rows - x.shape[0] + 1))
    return framed.unfold(0, 3, 1).unfold(1, 3, 1).permute(3, 4, 0, 1, 2)


@untraced
class _Around(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, rows: int, columns: int) -> Tensor:
        return _view(x, rows, columns)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        x, *ctx.sizes = inputs
        ctx.h, ctx.w = x.shape[:2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Gathered.apply(gradients[0], ctx.h, ctx.w), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Around.apply(tangents[0], *ctx.sizes)


@untraced
class _Gathered(torch.autograd.Function):
    """The adjoint of :class:`_Around`: every entry is added to the vertex that it is a view of."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, h: int, w: int) -> Tensor:
        _, _, rows, columns, batch = y.shape
        framed = y.new_zeros(rows + 2, columns + 2, batch)
        for i in range(3):
            for j in range(3):
                framed[i : i + rows, j : j + columns] += y[i, j]
        return framed[1 : 1 + h, 1 : 1 + w]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        y, *ctx.sizes = inputs
        ctx.rows, ctx.columns = y.shape[2:4]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Around.apply(gradients[0], ctx.rows, ctx.columns), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Gathered.apply(tangents[0], *ctx.sizes)
