"""The ranking loss of each list as an autograd.Function that computes the gradient together with the loss.

A method that can write its derivatives down (:class:`Ranking`) needs far fewer operations for loss and gradient than
autograd records and replays. Between forward and backward only the gradient is kept, (N, n). Where the gradient is
differentiated again, or in another mode (``torch.func``, forward mode), the loss is computed in ordinary operations,
from ``log_probabilities``: the same function, which autograd can differentiate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from newton_plugin._runtime.compiler import untraced
from newton_plugin.algorithms._log_domain import wide

__all__ = ["ListDerivatives", "ListLoss", "Ranking", "jvp_by_vjp", "plain_list_loss", "row_weight"]


class ListDerivatives(Protocol):
    """The ranking loss of some lists with its derivatives in the scores, from :meth:`Ranking.ranking`.

    Attributes:
        loss: of each list, (N,).
        gradient: of each list's loss in its scores, (N, n).
    """

    loss: Tensor
    gradient: Tensor

    def hessian(self) -> Tensor:
        """(N, n, n), exactly symmetric."""
        ...


@runtime_checkable
class Ranking(Protocol):
    """A sort that knows the derivatives of the ranking loss."""

    def ranking(self, scores: Tensor, target: Tensor, lengths: Tensor | None = None) -> ListDerivatives:
        """The loss of scores (N, n), n >= 2, with target (N, n, n): the true permutation matrices."""
        ...

    def log_probabilities(self, scores: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``(log P, log(1 - P))``; with ``lengths`` (N,), only the first so many elements of each list are real."""
        ...


def row_weight(scores: Tensor, lengths: Tensor | None) -> Tensor | float:
    """The weight of each row of P in the loss of its list: 1/m^2 for the m rows of a list of m, (..., n, 1)."""
    n = scores.shape[-1]
    if lengths is None:
        return 1 / n**2
    present = torch.arange(n, device=scores.device) < lengths.unsqueeze(-1)
    return (present / wide(lengths).square().clamp(min=1).unsqueeze(-1)).unsqueeze(-1)


def plain_list_loss(method: Any, scores: Tensor, target: Tensor, lengths: Tensor | None) -> Tensor:
    """``-1/m^2 sum_ij T_ij log P_ij + (1 - T_ij) log(1 - P_ij)`` of each list, in ordinary operations."""
    log_p, log_q = method.log_probabilities(scores) if lengths is None else method.log_probabilities(scores, lengths)
    entries = target * log_p + (1 - target) * log_q
    if lengths is None:
        return -entries.mean((-2, -1))
    present = torch.arange(scores.shape[-1], device=scores.device) < lengths.unsqueeze(-1)
    # The other entries hold what stands for log 0.
    entries = torch.where(present.unsqueeze(-1) & present.unsqueeze(-2), entries, 0.0)
    return -(entries * row_weight(scores, lengths)).sum((-2, -1))


def jvp_by_vjp(f: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    """``J v``, J the Jacobian of f at x, by reverse mode alone: the map from u to ``J' u`` is linear, with transpose J.

    A forward-mode rule cannot use forward mode itself (torch 2.13: "Nested forward mode AD").

    >>> jvp_by_vjp(lambda x: x**2, torch.tensor([1.0, 3.0]), torch.tensor([1.0, 10.0])).tolist()
    [2.0, 60.0]
    """
    y, pull = torch.func.vjp(f, x)[:2]
    return torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(y))[1](tangent)[0]


@untraced
class ListLoss(torch.autograd.Function):
    """``apply(scores (N, n), target (N, n, n), lengths (N,) or None, method, seen) -> (loss (N,), gradient)``.

    The :class:`ListDerivatives` are appended to ``seen``, where the Hessian is then at hand.
    """

    @staticmethod
    def forward(
        scores: Tensor, target: Tensor, lengths: Tensor | None, method: Ranking, seen: list[ListDerivatives]
    ) -> tuple[Tensor, Tensor]:
        derivatives = method.ranking(scores, target, lengths)
        seen.append(derivatives)
        return derivatives.loss, derivatives.gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        scores, target, lengths, ctx.method, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scores, target, lengths, output[1])
        ctx.save_for_forward(scores, target, lengths)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * 5
        scores, target, lengths, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient will be differentiated
            pull = torch.func.vjp(lambda s: plain_list_loss(ctx.method, s, target, lengths), scores)[1]
            return *pull(grad), None, None, None, None
        return (grad.unsqueeze(-1) * gradient).to(scores.dtype), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:
        scores, target, lengths = ctx.saved_tensors
        return jvp_by_vjp(lambda s: plain_list_loss(ctx.method, s, target, lengths), scores, tangents[0]), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        folded: list[Tensor | None] = []
        for tensor, dim in zip(inputs[:3], in_dims[:3], strict=True):
            if tensor is None:
                folded.append(None)
            elif dim is None:
                folded.append(tensor.expand(info.batch_size, *tensor.shape).flatten(0, 1))
            else:
                folded.append(tensor.movedim(dim, 0).flatten(0, 1))
        loss, gradient = ListLoss.apply(*folded, *inputs[3:])
        return (loss.unflatten(0, (info.batch_size, -1)), gradient.unflatten(0, (info.batch_size, -1))), (0, 0)
