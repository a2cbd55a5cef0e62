"""RankingLoss: learn scores when only their order is known.

A sorting relaxation turns scores into a soft permutation matrix ``P``; the order that was observed is a
permutation matrix ``T``. The loss is the mean binary cross-entropy of the n*n entries::

    -1/n^2 sum_ij  T_ij log P_ij + (1 - T_ij) log(1 - P_ij)

Both logarithms come from the method itself, never from ``P``: ``_log_domain.py`` explains why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from newton_plugin import with_hessian
from newton_plugin._errors import check_choice
from newton_plugin.algorithms._list_loss.function import ListLoss, Ranking, plain_list_loss
from newton_plugin.algorithms._log_domain import wide
from newton_plugin.algorithms._ranking.labels import check_ranks, judged, present_first
from newton_plugin.algorithms._sorting.methods import LogProbabilities, Method, matrix, resolve, with_lengths

__all__ = ["RankingLoss"]


class RankingLoss(torch.nn.Module):
    r"""Mean binary cross-entropy between a soft permutation matrix and the true one.

    .. math:: \ell = -\frac1{n^2}\sum_{ij} T_{ij}\log P_{ij} + (1 - T_{ij})\log(1 - P_{ij})

    Args:
        method: ``"neural_sort"``, ``"soft_sort"``, ``"sorting_network"`` (or the function or class itself),
            with keyword arguments; an object whose ``log_probabilities(scores)`` gives log P and log(1 - P),
            such as a ``SortingNetwork``; or any callable ``scores -> P``. Only the last is not in the log
            domain: it gets PyTorch's ``binary_cross_entropy`` on ``P``, which clips logarithms at -100 and
            whose float32 gradients explode on saturated wrong orders.
        reduction: ``"mean"`` or ``"sum"`` over the lists, or ``"none"`` (one value per list).
        **kwargs: given to the method, e.g. ``temperature=0.1`` or ``layout="bitonic", steepness=20.0``.

    Call it with scores (..., n), ranks (..., n), integers with 0 = smallest, and, for lists of different
    lengths in one batch, a boolean mask (..., n) that is true where there is an element. Masked entries may
    hold anything; each list then has the loss it has alone (its own n*n), and every list counts the same. The
    result is a scalar, or (...,) for ``"none"``, in the dtype of the scores (float32 for half precision).

    **Ties in the ranks** (``[0, 1, 1, 3]``, or ``[0, 1, 1, 2]``: only the order of the integers counts).
    ``T`` is then the mean over all orders that break the ties, so the loss is the expected loss under a
    random breaking.

    Raises:
        ArgumentError: a rank is negative and not masked, as padding is. (On a device, in compiled code and under
            ``torch.func`` the host does not look: the loss of this list is NaN.)
        ArgumentError, ArgumentTypeError, ShapeError: a method, dtype or shape that does not fit.

    Source: Grover et al., ICLR 2019 (NeuralSort); Petersen et al., "Differentiable sorting networks for
    scalable sorting and ranking supervision", ICML 2021, section 3 (this loss).

    >>> loss = RankingLoss("neural_sort", temperature=1.0)
    >>> ranks = torch.tensor([[0, 1]])

    Two scores d apart in the right order have four entries of P equal to s = 1/(1 + exp(-d)) or 1 - s, each
    with the loss log(1 + exp(-d)); in the wrong order it is log(1 + exp(d)), at any distance:

    >>> round(loss(torch.tensor([[0.0, 1.0]]), ranks).item(), 4)  # log(1 + exp(-1))
    0.3133
    >>> loss(torch.tensor([[1e6, 0.0]]), ranks).item()
    1000000.0
    """

    def __init__(self, method: Method = "neural_sort", *, reduction: str = "mean", **kwargs: Any) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.reduction = reduction
        self.method = resolve(method, kwargs)

    def extra_repr(self) -> str:
        own = "" if isinstance(self.method, torch.nn.Module) else f"{self.method!r}, "
        return f"{own}reduction={self.reduction!r}"

    def forward(self, scores: Tensor, ranks: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of ``scores`` (..., n) given ``ranks`` (..., n)."""
        verdict = check_ranks(scores, ranks, mask)
        hessian: Callable[[], Tensor] | None = None
        if scores.shape[-1] == 1:
            loss = 0.0 * torch.nan_to_num(scores.squeeze(-1))  # one element is always in order
        elif isinstance(self.method, LogProbabilities):
            loss, hessian = self._lists(scores, ranks, mask)
        else:
            loss = self._of_matrix(scores, ranks, mask)
        loss = judged(loss, verdict)
        count = loss.numel()
        if self.reduction == "mean":
            loss = loss.mean()
        elif self.reduction == "sum":
            loss = loss.sum()
        loss = loss.to(torch.float32 if scores.element_size() < 4 else scores.dtype)
        if hessian is None or scores.ndim != 2:
            return loss
        of_each = hessian
        return with_hessian(loss, scores, lambda: of_each().div_(count if self.reduction == "mean" else 1))

    def _lists(self, scores: Tensor, ranks: Tensor, mask: Tensor | None) -> tuple[Tensor, Callable[[], Tensor] | None]:
        """The loss of each list, (...,), and a function for their Hessians: None if unknown or not needed."""
        ranks, lengths, order = ranks.long(), None, None
        if mask is not None:
            order, lengths = present_first(mask)  # a list of length m then fills the first m places
            scores = scores.masked_fill(~mask, 0.0).gather(-1, order)
            ranks = ranks.masked_fill(~mask, torch.iinfo(torch.long).max).gather(-1, order)
        target = _targets(ranks)
        needed = torch.is_grad_enabled() and scores.requires_grad
        if not needed or torch.compiler.is_compiling() or not isinstance(self.method, Ranking):
            if lengths is None:
                return plain_list_loss(self.method, scores, target, None), None
            return with_lengths(self.method, lambda: plain_list_loss(self.method, scores, target, lengths)), None
        shape, seen = scores.shape, []
        flat = (scores.unsqueeze(0).flatten(0, -2), target.unsqueeze(0).flatten(0, -3))
        with torch.autocast(scores.device.type, enabled=False):
            loss, _ = ListLoss.apply(*flat, None if lengths is None else lengths.flatten(), self.method, seen)
        loss = loss.reshape(shape[:-1])
        if not seen:  # inside a transform of torch.func, which differentiates by itself
            return loss, None
        hessian = seen[0].hessian
        return loss, hessian if order is None else lambda: _reordered(hessian(), order)

    def _of_matrix(self, scores: Tensor, ranks: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            with_lengths(self.method, lambda: None)
        p = matrix(self.method, scores)
        target = _targets(ranks.long()).to(p.dtype)
        return torch.nn.functional.binary_cross_entropy(p.clamp(0, 1), target, reduction="none").mean((-2, -1))


def _reordered(hessian: Tensor, order: Tensor) -> Tensor:
    """The Hessian in the scores before they were gathered by ``order``."""
    back = order.argsort(-1).unsqueeze(-1).expand_as(hessian)
    return hessian.gather(-2, back).gather(-1, back.mT)


def _targets(ranks: Tensor) -> Tensor:
    # Row i marks the element whose rank equals the i-th smallest rank; tied elements share the row equally.
    hit = ranks.sort(dim=-1).values.unsqueeze(-1) == ranks.unsqueeze(-2)
    return wide(hit) / hit.sum(-1, keepdim=True)
