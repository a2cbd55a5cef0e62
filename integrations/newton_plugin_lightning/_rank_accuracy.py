"""RankAccuracy: how many rankings are right, in full or element by element.

A metric for learning to rank a *list*: scores (N, n) order the n elements of each list, ranks (N, n) are the
truth. A list of ten is fully right by chance once in 10! = 3,628,800 times, an element once in ten.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from newton_plugin import ArgumentError, ArgumentTypeError, ShapeError

__all__ = ["RankAccuracy"]

_MODES = ("full", "elements")


class RankAccuracy(Metric):
    r"""The share of rankings (``mode="full"``) or of their elements (``mode="elements"``) that are right.

    With :math:`\hat r_j = \#\{k : s_k < s_j\}`, element :math:`j` is right if :math:`\hat r_j = r_j` and no
    other element has the same score: a tie decides nothing, so it counts as wrong (constant scores get 0,
    however the sort breaks ties), and so does NaN. A list is right if all its elements are.

    Args:
        mode: "full" counts lists, "elements" counts elements.
        validate_args: check that every row of ``ranks`` is a permutation of 0..n-1 (one device
            synchronisation per update). Shapes and dtypes are always checked.
        kwargs: those of :class:`torchmetrics.Metric` (``dist_sync_on_step``, ...).

    Raises:
        ArgumentError: ``mode`` is unknown, or ``ranks`` are not permutations.
        ArgumentTypeError: ``scores`` are not floating point or ``ranks`` not integers.
        ShapeError: ``scores`` and ``ranks`` are not both (N, n).

    >>> import torch
    >>> scores = torch.tensor([[0.1, 0.5, 0.9], [0.9, 0.5, 0.1]])
    >>> ranks = torch.tensor([[0, 1, 2], [0, 1, 2]])
    >>> RankAccuracy()(scores, ranks)  # the first list is right
    tensor(0.5000)
    >>> RankAccuracy(mode="elements")(scores, ranks)  # ... and the middle of the second
    tensor(0.6667)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    right: Tensor
    total: Tensor

    def __init__(
        self, mode: Literal["full", "elements"] = "full", *, validate_args: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if mode not in _MODES:
            listed = " or ".join(repr(m) for m in _MODES)
            raise ArgumentError(f"mode must be {listed}; got {mode!r}.")
        self.mode = mode
        self.validate_args = validate_args
        self.add_state("right", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, scores: Tensor, ranks: Tensor) -> None:
        """Count ``scores`` (N, n), floating point, against ``ranks`` (N, n), integers with 0 = smallest."""
        _check(scores, ranks)
        n = ranks.shape[-1]
        positions = torch.arange(n, device=ranks.device)
        if self.validate_args and not bool((ranks.sort(-1).values == positions).all()):
            raise ArgumentError(
                f"each row of ranks must be a permutation of 0..{n - 1} (0 = smallest); "
                f"got values from {int(ranks.min())} to {int(ranks.max())}, or repeated ones. "
                "From values, ranks are values.argsort(-1).argsort(-1)."
            )
        ordered, order = scores.detach().sort(dim=-1)
        tied = ordered[..., 1:] <= ordered[..., :-1]
        edge = tied.new_zeros(*tied.shape[:-1], 1)
        doubtful = torch.cat([tied, edge], -1) | torch.cat([edge, tied], -1) | ordered.isnan()
        correct = (ranks.gather(-1, order) == positions) & ~doubtful
        if self.mode == "full":
            correct = correct.all(-1)
        self.right += correct.sum()
        self.total += correct.numel()

    def compute(self) -> Tensor:
        """The share so far, a scalar in [0, 1]."""
        return self.right / self.total

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value, or a sequence of them as a curve; (figure, axes) as for any torchmetrics metric."""
        return self._plot(val, ax)


def _check(scores: Any, ranks: Any) -> None:
    for name, tensor in (("scores", scores), ("ranks", ranks)):
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}.")
    if scores.ndim != 2 or scores.shape != ranks.shape or 0 in scores.shape:
        raise ShapeError(
            "scores and ranks must both be (N, n), N lists of n elements, not empty; got "
            f"{tuple(scores.shape)} and {tuple(ranks.shape)}. Flatten leading dimensions first."
        )
    if not scores.is_floating_point():
        raise ArgumentTypeError(f"scores must be floating point; got {scores.dtype}. Pass scores.float().")
    if ranks.is_floating_point() or ranks.is_complex() or ranks.dtype == torch.bool:
        raise ArgumentTypeError(f"ranks must be integers; got {ranks.dtype}. Pass ranks.long().")
