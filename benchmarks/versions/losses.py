"""Losses of every kind that the package treats differently. Each takes outputs, a target and ``reduction``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import newton_plugin as npl
from newton_plugin.algorithms import RankingLoss

__all__ = ["CLASSES", "FIELDS", "LOSSES", "VALUES", "Loss"]

Loss = Callable[..., Tensor]

_RANKING = {r: RankingLoss("neural_sort", temperature=0.5, reduction=r) for r in ("mean", "sum", "none")}


def _reduced(each: Tensor, reduction: str) -> Tensor:
    """One number for each sample, reduced."""
    return each if reduction == "none" else each.mean() if reduction == "mean" else each.sum()


def weighted(y: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Cross-entropy with class weights, an ignored class and label smoothing."""
    weight = torch.linspace(0.5, 2.0, y.shape[1], dtype=y.dtype)
    return F.cross_entropy(y, target, weight, ignore_index=1, label_smoothing=0.1, reduction=reduction)


def smoothed(y: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Cross-entropy with label smoothing alone."""
    return F.cross_entropy(y, target, label_smoothing=0.2, reduction=reduction)


def likelihood(y: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Cross-entropy in two steps."""
    return F.nll_loss(torch.log_softmax(y, 1), target, reduction=reduction)


def indefinite(y: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Not convex: Hessians have eigenvalues of both signs."""
    each = (torch.sigmoid(3 * y) - target).square().sum(-1) + 0.1 * torch.sin(y.square().sum(-1))
    return _reduced(each, reduction)


def contrastive(y: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Couples the samples of the batch."""
    similar = F.normalize(y, dim=-1) @ F.normalize(target, dim=-1).mT
    return F.cross_entropy(similar / 0.5, torch.arange(len(y)), reduction=reduction)


def piecewise(y: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Absolute differences: the Hessian is zero."""
    return _reduced((y - target).abs().sum(-1), reduction)


def known_blocks(y: Tensor, target: Tensor, reduction: str) -> Tensor:
    """A user's loss that says its Hessian."""
    loss, at = _reduced((y - target).pow(4).sum(-1), reduction), (y - target).detach()
    share = 1 / max(1, len(y)) if reduction == "mean" else 1.0
    return npl.with_hessian(loss, y, lambda: torch.diag_embed(12 * share * at**2))


def known_products(y: Tensor, target: Tensor, reduction: str) -> Tensor:
    """A user's loss that says its Hessian and products with it."""
    loss, at = _reduced((y - target).cosh().sum(-1), reduction), (y - target).detach()
    share = 1 / max(1, len(y)) if reduction == "mean" else 1.0
    return npl.with_hessian(
        loss, y, lambda: torch.diag_embed(share * at.cosh()), products=lambda v: share * at.cosh() * v
    )


def ranking(y: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Of a list of scores, its Hessian written down."""
    return _RANKING[reduction](y, target)


def not_differentiable_twice(y: Tensor, target: Tensor, reduction: str) -> Tensor:
    """torch has no second derivative of it."""
    return _reduced(torch.cdist(y.unsqueeze(1), target.unsqueeze(1)).flatten(1).sum(-1), reduction)


# By what the target is: a class of each sample, or numbers like the outputs.
CLASSES: dict[str, Loss] = {
    "cross_entropy": F.cross_entropy,
    "weighted": weighted,
    "smoothed": smoothed,
    "likelihood": likelihood,
}
VALUES: dict[str, Loss] = {
    "mse": F.mse_loss,
    "binary": F.binary_cross_entropy_with_logits,
    "huber": F.huber_loss,
    "indefinite": indefinite,
    "contrastive": contrastive,
    "piecewise": piecewise,
    "known_blocks": known_blocks,
    "known_products": known_products,
    "ranking": ranking,
    "not_differentiable_twice": not_differentiable_twice,
}
LOSSES = CLASSES | VALUES
FIELDS = ("cross_entropy", "weighted", "mse", "binary", "huber")  # that take outputs of any shape
