"""The same training by the live graph, by the pure engine and by the wrapped loss: the gradients of several steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vjp, vmap
from torch.utils._pytree import tree_map

import newton_plugin as npl

__all__ = ["DOOR", "PURE", "Batch", "by_live_graph", "total"]

Batch = tuple[Tensor, ...]
"""The arguments of a loss, the outputs first."""

Gradient = Callable[[Callable[[Tensor], tuple[Tensor, Any]], Tensor], tuple[Tensor, Any]]
"""From a function with something beside its result, and a tensor, to the gradient and what is beside it."""


def total(loss: Tensor) -> Tensor:
    """One number of a loss; the samples of an unreduced one count 1, 2, 3, ..."""
    if loss.numel() == 1:
        return loss.sum()
    return (loss.flatten() * torch.arange(1, loss.numel() + 1, dtype=loss.dtype)).sum()


def by_live_graph(loss_fn: Callable[..., Tensor], data: Sequence[Batch], **settings: Any) -> Tensor:
    """The truth: ``npl.newton_loss`` in a plain loop, with ``backward``."""
    newton, found = npl.newton_loss(loss_fn, **settings), []
    for y, *rest in data:
        y = y.clone().requires_grad_()
        total(newton(y * 1, *rest)).backward()
        assert y.grad is not None
        found.append(y.grad)
    return torch.stack(found)


def _by_backward(f: Callable[[Tensor], tuple[Tensor, Any]], y: Tensor) -> tuple[Tensor, Any]:
    y = y.clone().requires_grad_()
    loss, beside = f(y * 1)
    (gradient,) = torch.autograd.grad(loss, y)
    return gradient, tree_map(torch.detach, beside)


def _by_vjp(f: Callable[[Tensor], tuple[Tensor, Any]], y: Tensor) -> tuple[Tensor, Any]:
    loss, pull, beside = vjp(f, y, has_aux=True)  # type: ignore[misc]
    return pull(torch.ones_like(loss))[0], beside


def _one_of_two(f: Callable[[Tensor], tuple[Tensor, Any]], y: Tensor) -> tuple[Tensor, Any]:
    """Two members with other outputs, of which the second is the one that is asked for."""
    gradients, beside = vmap(grad(f, has_aux=True), randomness="same")(torch.stack([y.flip(0), y]))
    return gradients[1], tree_map(lambda t: t[1], beside)


def _one_of_four(f: Callable[[Tensor], tuple[Tensor, Any]], y: Tensor) -> tuple[Tensor, Any]:
    members = torch.stack([y.flip(0), y, y / 2, y / 3]).reshape(2, 2, *y.shape)
    gradients, beside = vmap(vmap(grad(f, has_aux=True), randomness="same"), randomness="same")(members)
    return gradients[0, 1], tree_map(lambda t: t[0, 1], beside)


def _of_the_sum(f: Callable[[Tensor], tuple[Tensor, Any]], y: Tensor) -> tuple[Tensor, Any]:
    def both(members: Tensor) -> tuple[Tensor, Any]:
        losses, beside = vmap(f, randomness="same")(members)
        return losses.sum(), beside

    gradients, beside = grad(both, has_aux=True)(torch.stack([y.flip(0), y]))
    return gradients[1], tree_map(lambda t: t[1], beside)


GRADIENTS: dict[str, Gradient] = {
    "grad": lambda f, y: grad(f, has_aux=True)(y),
    "backward": _by_backward,
    "vjp": _by_vjp,
    "jacrev": lambda f, y: jacrev(f, has_aux=True)(y),
    "jacfwd": lambda f, y: jacfwd(f, has_aux=True)(y),
    "vmap(grad)": _one_of_two,
    "vmap(vmap(grad))": _one_of_four,
    "grad(vmap)": _of_the_sum,
}


def _pure(gradient: Gradient) -> Callable[..., Tensor]:
    def run(loss_fn: Callable[..., Tensor], data: Sequence[Batch], **settings: Any) -> Tensor:
        newton, found = npl.functional.newton_loss(loss_fn, **settings), []
        state = newton.init(*data[0])
        for y, *rest in data:

            def f(v: Tensor, state: Any = state, rest: Any = rest) -> tuple[Tensor, Any]:
                loss, after = newton.apply(state, v, *rest)
                return total(loss), after

            step, state = gradient(f, y)
            found.append(step)
        return torch.stack(found)

    return run


def _door(gradient: Gradient) -> Callable[..., Tensor]:
    def run(loss_fn: Callable[..., Tensor], data: Sequence[Batch], **settings: Any) -> Tensor:
        newton, found = npl.newton_loss(loss_fn, **settings), []
        for y, *rest in data:

            def f(v: Tensor, rest: Any = rest) -> tuple[Tensor, Any]:
                return total(newton(v, *rest)), ()

            found.append(gradient(f, y)[0])
        return torch.stack(found)

    return run


PURE = {name: _pure(gradient) for name, gradient in GRADIENTS.items()}
"""By ``npl.functional.newton_loss``."""

DOOR = {name: _door(gradient) for name, gradient in GRADIENTS.items() if name != "backward"}
"""By ``npl.newton_loss``, which keeps the states."""
