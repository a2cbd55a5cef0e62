"""The minimum of a linear cost over a finite set, as a differentiable function of the costs.

A path, an assignment, a spanning tree: each is a 0/1 vector x, and an exact solver finds the cheapest::

    f(c) = min_x <c, x>        x*(c) = the solver's choice among the minimisers

f is concave and piecewise linear. Where the minimiser is unique it is the same nearby, so the gradient of f is ``x*``
and the Hessian is zero; at a tie ``x*`` is one of the supergradients. ``x*`` itself is piecewise constant: it has no
useful derivative and is marked as not differentiable. (Smoothing, perturbation and relaxation give it one.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError
from newton_plugin._runtime.compiler import untraced

__all__ = ["Cheapest", "ShortestPath", "check_costs", "check_distance"]

Solver = Callable[[Tensor], tuple[Tensor, Tensor]]


class ShortestPath(NamedTuple):
    """What the exact solvers return: ``distance`` (...) and the 0/1 indicator ``path`` (shaped like the costs)."""

    distance: Tensor
    path: Tensor


@untraced
class Cheapest(torch.autograd.Function):
    """``(costs, solver, dims) -> (f(c), x*(c))``; the last ``dims`` dimensions of the costs are one problem.

    ``solver`` gets all problems at once, flattened to (B, ...) and contiguous, and returns two tensors: (B) and
    (B, ...).
    """

    @staticmethod
    def forward(costs: Tensor, solver: Solver, dims: int) -> tuple[Tensor, Tensor]:
        batch, problem = costs.shape[: costs.ndim - dims], costs.shape[costs.ndim - dims :]
        minimum, choice = solver(costs.detach().reshape(batch.numel(), *problem).contiguous())
        return minimum.to(costs.dtype).reshape(batch), choice.to(costs.dtype).reshape(costs.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        choice = output[1]
        ctx.dims = inputs[2]
        ctx.mark_non_differentiable(choice)
        ctx.save_for_backward(choice)
        ctx.save_for_forward(choice)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (choice,) = ctx.saved_tensors
        return gradients[0].reshape(*gradients[0].shape, *[1] * ctx.dims) * choice, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        (choice,) = ctx.saved_tensors
        return (tangents[0] * choice).sum(tuple(range(-ctx.dims, 0))), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, tuple[int, int]]:
        costs, solver, dims = args
        return Cheapest.apply(costs.movedim(in_dims[0], 0), solver, dims), (0, 0)


def check_costs(name: str, costs: Tensor) -> None:
    """Raise for NaN, negative or infinite costs (one device synchronisation).

    The compiled solvers look at the costs as they go and call this only to raise.
    """
    good = (costs >= 0) & (costs < torch.inf)
    if not bool(good.all()):
        where = tuple((~good).nonzero()[0].tolist())
        raise ArgumentError(
            f"{name} must be finite and not negative; got {costs[where].item()} at index {where} of the problems in "
            f"one row, {tuple(costs.shape)}. Make them so in the model, e.g. torch.nn.functional.softplus({name})."
        )


def check_distance(name: str, costs: Tensor, distance: Tensor) -> None:
    """Raise if a distance is infinite although the costs are not (one device synchronisation)."""
    if not bool((distance < torch.inf).all()):
        raise ArgumentError(
            f"{name} are too large: the sum along a path overflows {distance.dtype}; the largest of {name} is "
            f"{costs.max().item()}. Rescale them; the path does not change."
        )
