"""The losses that the pure engine has to differentiate: those of ``tests/cases.py``, torch's own, and the package's."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from tests.cases import CLASSES, LOSSES, N
from torch import Tensor

from newton_plugin.algorithms import (
    FenchelYoungLoss,
    RankingLoss,
    StochasticSmoothing,
    relaxed_bellman_ford,
    shortest_path,
    soft_rank,
    spearman_loss,
)

__all__ = ["ALL", "UNREDUCED", "Loss", "batches"]

Loss = tuple[Callable[[Tensor, Tensor], Tensor], Callable[[torch.Generator], tuple[Tensor, Tensor]]]
"""The loss, and what makes a batch for it."""

_W = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


def _reals(g: torch.Generator) -> tuple[Tensor, Tensor]:
    y, t = torch.randn(2, N, CLASSES, generator=g, dtype=torch.float64)
    return 2 * y, t


def _classes(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return _reals(g)[0], torch.randint(0, CLASSES, (N,), generator=g)


def _soft(g: torch.Generator) -> tuple[Tensor, Tensor]:
    y, t = _reals(g)
    return y, t.softmax(-1)


def _signs(g: torch.Generator) -> tuple[Tensor, Tensor]:
    y, t = _reals(g)
    return y, t.sign()


def _several(g: torch.Generator) -> tuple[Tensor, Tensor]:
    y, _ = _reals(g)
    return y, torch.tensor([1, -1, -1]).expand(N, 3).contiguous().roll(1, 0)


def _ignored(g: torch.Generator) -> tuple[Tensor, Tensor]:
    y, t = _classes(g)
    return y, torch.where(torch.arange(N) < 2, -100, t)


def _positive(g: torch.Generator) -> tuple[Tensor, Tensor]:
    y, t = torch.rand(2, N, CLASSES, generator=g, dtype=torch.float64)
    return y * 0.8 + 0.1, t * 0.8 + 0.1


def _in_place(y: Tensor, t: Tensor) -> Tensor:
    y = y.mul_(2.0)
    y[:, 0] += 1.0
    return (y - t).pow_(2).sigmoid_().sum() / len(y)


TORCH: dict[str, Loss] = {
    "ignore_index": (F.cross_entropy, _ignored),
    "nll": (lambda y, t: F.nll_loss(F.log_softmax(y, -1), t, weight=_W), _classes),
    "label_smoothing": (lambda y, t: F.cross_entropy(y, t, label_smoothing=0.1), _classes),
    "weighted": (lambda y, t: F.cross_entropy(y, t, weight=_W, ignore_index=1), _classes),
    "probabilities": (F.cross_entropy, _soft),
    "kl": (lambda y, t: F.kl_div(F.log_softmax(y, -1), t, reduction="batchmean"), _soft),
    "kl_log": (lambda y, t: F.kl_div(F.log_softmax(y, -1), t.log(), reduction="batchmean", log_target=True), _soft),
    "l1": (F.l1_loss, _reals),
    "smooth_l1": (lambda y, t: F.smooth_l1_loss(y, t, beta=0.7), _reals),
    "huber_wide": (lambda y, t: F.huber_loss(y, t, delta=0.3), _reals),
    "bce_probabilities": (F.binary_cross_entropy, _positive),
    "poisson": (lambda y, t: F.poisson_nll_loss(y, t.abs(), full=True), _reals),
    "gaussian": (lambda y, t: F.gaussian_nll_loss(y, t, y.square() + 1), _reals),
    "soft_margin": (F.soft_margin_loss, _signs),
    "hinge_embedding": (F.hinge_embedding_loss, _signs),
    "multi_margin": (lambda y, t: F.multi_margin_loss(y, t, p=2), _classes),
    "multilabel_margin": (F.multilabel_margin_loss, _several),
    "multilabel_soft_margin": (lambda y, t: F.multilabel_soft_margin_loss(y, t.clamp(0, 1)), _signs),
    "margin_ranking": (lambda y, t: F.margin_ranking_loss(y, y.flip(-1), t), _signs),
    "cosine": (lambda y, t: (1 - F.cosine_similarity(y, t)).mean(), _reals),
    "cosine_embedding": (lambda y, t: F.cosine_embedding_loss(y, t, t[:, 0].sign()), _reals),
    "triplet": (lambda y, t: F.triplet_margin_loss(y, t, -t), _reals),
    "logcosh": (lambda y, t: (y - t).cosh().log().sum(-1).mean(), _reals),
    "in_place": (_in_place, _reals),
    "of_shape_one": (lambda y, t: F.mse_loss(y, t).reshape(1), _reals),
}


def _scores(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 5, generator=g, dtype=torch.float64), torch.rand(4, 5, generator=g).argsort(-1)


def _grid(g: torch.Generator) -> tuple[Tensor, Tensor]:
    costs = torch.rand(3, 9, generator=g, dtype=torch.float64) + 0.1
    path = torch.zeros(3, 3, 3, dtype=torch.float64)
    path[:, 0], path[:, :, 2] = 1.0, 1.0
    return costs, path


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _cheapest(costs: Tensor) -> Tensor:
    return shortest_path(costs.abs(), backend="torch").path


def _fenchel_young(y: Tensor, t: Tensor) -> Tensor:
    loss = FenchelYoungLoss(_cheapest, samples=3, sigma=0.05, minimize=True, generator=_seeded())
    return loss(y.reshape(-1, 3, 3), t)


def _smoothed(y: Tensor, t: Tensor) -> Tensor:
    def fn(z: Tensor) -> Tensor:
        return (z - t.repeat(len(z) // len(t), 1)).sign().sum(-1)

    return StochasticSmoothing(fn, samples=20, sigma=0.5, generator=_seeded())(y).mean()


PACKAGE: dict[str, Loss] = {
    "soft_sort": (RankingLoss("soft_sort", temperature=0.5), _scores),
    "sorting_network": (RankingLoss("sorting_network", layout="bitonic", steepness=5.0), _scores),
    "spearman": (lambda y, t: spearman_loss(y, t, method="neural_sort", temperature=0.5), _scores),
    "soft_rank": (lambda y, t: F.mse_loss(soft_rank(y, method="soft_sort", temperature=0.5), t.to(y)), _scores),
    "bellman_ford": (lambda y, t: F.mse_loss(relaxed_bellman_ford(y.reshape(-1, 3, 3)), t), _grid),
    "fenchel_young": (_fenchel_young, _grid),
    "smoothing": (_smoothed, _reals),
}

ALL: dict[str, Loss] = {**LOSSES, **TORCH, **PACKAGE}

UNREDUCED: dict[str, Loss] = {
    "cross_entropy": (lambda y, t: F.cross_entropy(y, t, reduction="none"), _classes),
    "cross_entropy_ignored": (lambda y, t: F.cross_entropy(y, t, reduction="none"), _ignored),
    "squares": (lambda y, t: (y - t).square().sum(-1), _reals),
    "column": (lambda y, t: (y - t).cosh().sum(-1, keepdim=True), _reals),
}


def batches(loss: Loss, count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of outputs and targets."""
    generator = torch.Generator().manual_seed(seed)
    return [loss[1](generator) for _ in range(count)]
