"""RankingLoss: learn scores when only their order is known.

A sorting relaxation turns scores into a soft permutation matrix ``P``; the order that was observed is a
permutation matrix ``T``. The loss is the mean binary cross-entropy of the n*n entries::

    -1/n^2 sum_ij  T_ij log P_ij + (1 - T_ij) log(1 - P_ij)

Both logarithms come from the method itself, never from ``P``: see ``_log_domain``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentTypeError, ShapeError, check_choice, check_floating
from newton_plugin.algorithms._neural_sort import NeuralSort, neural_sort

__all__ = ["LogProbabilities", "RankingLoss"]


@runtime_checkable
class LogProbabilities(Protocol):
    """What RankingLoss asks of a method that is to be stable."""

    def log_probabilities(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """``(log P, log(1 - P))``, each (..., n, n), from scores (..., n)."""
        ...


_METHODS: dict[str, Callable[..., LogProbabilities]] = {"neural_sort": NeuralSort}
_BY_FUNCTION: dict[Any, str] = {neural_sort: "neural_sort"}


class RankingLoss(torch.nn.Module):
    r"""Mean binary cross-entropy between a soft permutation matrix and the true one.

    .. math:: \ell = -\frac1{n^2}\sum_{ij} T_{ij}\log P_{ij} + (1 - T_{ij})\log(1 - P_{ij})

    Args:
        method: ``"neural_sort"`` (or the function itself), with its keyword arguments; an object with a
            method ``log_probabilities(scores) -> (log P, log(1 - P))``; or any callable ``scores -> P``. Only
            the last is not in the log domain: it gets PyTorch's ``binary_cross_entropy`` on ``P``, which
            clips logarithms at -100 and whose float32 gradients explode on saturated wrong orders.
        reduction: ``"mean"`` or ``"sum"`` over the lists, or ``"none"`` (one value per list).
        **kwargs: given to the method, e.g. ``temperature=0.1``.

    Shapes:
        scores (..., n), ranks (..., n) integers, 0 = smallest; the result is a scalar, or (...,) for
        ``"none"``.

    **Ties in the ranks** (``[0, 1, 1, 3]``, or ``[0, 1, 1, 2]``: only the order of the integers counts).
    ``T`` is then the mean over all orders that break the ties, so the loss is the expected loss under a
    random breaking.

    Raises:
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

    def __init__(
        self,
        method: str | LogProbabilities | Callable[..., Tensor] = "neural_sort",
        *,
        reduction: str = "mean",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.reduction = reduction
        self.method = _build(method, kwargs)

    def extra_repr(self) -> str:
        return f"{self.method!r}, reduction={self.reduction!r}"

    def forward(self, scores: Tensor, ranks: Tensor) -> Tensor:
        """The loss of ``scores`` (..., n) given ``ranks`` (..., n)."""
        _check(scores, ranks)
        n = scores.shape[-1]
        if n == 1:
            entries = 0.0 * scores.unsqueeze(-1)  # one element is always in order
        else:
            entries = self._entries(scores, _targets(ranks))
        loss = entries.sum((-2, -1)) / n**2
        if self.reduction == "mean":
            loss = loss.mean()
        elif self.reduction == "sum":
            loss = loss.sum()
        return loss.to(torch.float32 if scores.element_size() < 4 else scores.dtype)

    def _entries(self, scores: Tensor, target: Tensor) -> Tensor:
        if isinstance(self.method, LogProbabilities):
            log_p, log_q = self.method.log_probabilities(scores)
            return -(target * log_p + (1 - target) * log_q)
        p = self.method(scores)
        return torch.nn.functional.binary_cross_entropy(p.clamp(0, 1), target.to(p.dtype), reduction="none")


def _build(method: Any, kwargs: dict[str, Any]) -> Any:
    if isinstance(method, str):
        check_choice("method", method, tuple(_METHODS), "Or pass a callable: scores -> P.")
        return _METHODS[method](**kwargs)
    if callable(method) and method in _BY_FUNCTION:
        return _METHODS[_BY_FUNCTION[method]](**kwargs)
    if not (callable(method) or isinstance(method, LogProbabilities)):
        raise ArgumentTypeError(
            f"method must be one of {', '.join(map(repr, _METHODS))} or a callable scores -> P; "
            f"got {type(method).__name__}."
        )
    if kwargs:
        raise ArgumentTypeError(
            f"keyword arguments {sorted(kwargs)} belong to a method given by name; method is {method!r}. "
            "Bind them first, e.g. functools.partial(method, ...)."
        )
    return method


def _targets(ranks: Tensor) -> Tensor:
    # Position i holds the element whose rank equals the i-th smallest rank; with ties several do, equally.
    hit = ranks.sort(dim=-1).values.unsqueeze(-1) == ranks.unsqueeze(-2)
    return hit / hit.sum(-1, keepdim=True)


def _check(scores: Tensor, ranks: Tensor) -> None:
    check_floating("scores", scores)
    if not isinstance(ranks, Tensor) or ranks.is_floating_point() or ranks.is_complex():
        raise ArgumentTypeError(
            f"ranks must be a tensor of integers, 0 = smallest; "
            f"got {ranks.dtype if isinstance(ranks, Tensor) else type(ranks).__name__}. "
            "From values, take values.argsort(-1).argsort(-1)."
        )
    if scores.ndim == 0 or scores.shape[-1] == 0 or scores.shape != ranks.shape:
        raise ShapeError(
            f"scores and ranks must have the same shape (..., n), n >= 1; got {tuple(scores.shape)} and "
            f"{tuple(ranks.shape)}. A scorer that ends in Linear(..., 1) needs .squeeze(-1)."
        )
