"""PathAccuracy and CostRatio: how many predicted paths are exactly right, and how much more they cost than the best.

Where several paths are equally short, a predicted path may differ from the target and be as good. The share of exact
matches then understates a model; the ratio of costs does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from newton_plugin import ArgumentTypeError, ShapeError

__all__ = ["CostRatio", "PathAccuracy"]


class _Mean(Metric):
    """The mean over all problems of one number per problem."""

    is_differentiable = False
    full_state_update = False

    sum: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sum", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _count(self, values: Tensor) -> None:
        self.sum += values.to(self.sum.dtype).sum()
        self.total += values.numel()

    def compute(self) -> Tensor:
        """The mean so far, a scalar."""
        return self.sum / self.total

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value, or a sequence of them as a curve; (figure, axes) as for any torchmetrics metric."""
        return self._plot(val, ax)


class PathAccuracy(_Mean):
    r"""The share of paths that are right on every vertex (or edge): "perfect matches".

    ``update(paths, targets)``: indicators (N, ...), 1 on the path and 0 elsewhere, any dtype. A soft path counts as
    wrong unless it is exactly the target: decide first, by ``shortest_path`` on the predicted costs.

    Args:
        kwargs: those of :class:`torchmetrics.Metric` (``dist_sync_on_step``, ...).

    Raises:
        ArgumentTypeError, ShapeError: not two tensors of one shape (N, ...).

    >>> import torch
    >>> targets = torch.tensor([[[1, 0], [0, 1]], [[1, 0], [0, 1]]])
    >>> paths = torch.tensor([[[1, 0], [0, 1]], [[1, 1], [0, 1]]])
    >>> PathAccuracy()(paths, targets)
    tensor(0.5000)
    """

    higher_is_better = True
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def update(self, paths: Tensor, targets: Tensor) -> None:
        """Count ``paths`` (N, ...) against ``targets`` (N, ...)."""
        _check(paths=paths, targets=targets)
        self._count((paths == targets).flatten(1).all(1))


class CostRatio(_Mean):
    r"""The true cost of the predicted path over that of the best path, averaged over the problems.

    .. math:: \frac1N \sum_i \frac{\langle c_i, \hat p_i \rangle}{\langle c_i, p_i \rangle} \ge 1

    ``update(paths, targets, costs)``: indicators (N, ...) of the predicted and of the best paths, and the *true*
    costs (N, ...), not negative. A path of cost 0 has the ratio 1 to another of cost 0, else infinity. It is not
    checked that the predictions are paths: an empty one would score 0.

    Args:
        kwargs: those of :class:`torchmetrics.Metric` (``dist_sync_on_step``, ...).

    Raises:
        ArgumentTypeError, ShapeError: not three tensors of one shape (N, ...).

    >>> import torch
    >>> costs = torch.tensor([[[1.0, 5.0], [2.0, 1.0]]])
    >>> best = torch.tensor([[[1, 0], [0, 1]]])  # 2
    >>> detour = torch.tensor([[[1, 0], [1, 1]]])  # 4
    >>> CostRatio()(detour, best, costs)
    tensor(2.)
    """

    higher_is_better = False
    plot_lower_bound = 1.0

    def update(self, paths: Tensor, targets: Tensor, costs: Tensor) -> None:
        """Count ``paths`` (N, ...) against ``targets`` (N, ...), both priced by ``costs`` (N, ...)."""
        _check(paths=paths, targets=targets, costs=costs)
        price = costs.detach().flatten(1)
        paid, best = ((price * p.detach().flatten(1)).sum(1) for p in (paths, targets))
        self._count(torch.where(paid == best, 1.0, paid / best))


def _check(**tensors: Any) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}.")
    shapes = [tuple(t.shape) for t in tensors.values()]
    if len(set(shapes)) > 1 or len(shapes[0]) < 2:
        listed = " and ".join(tensors)
        raise ShapeError(
            f"{listed} must have one shape (N, ...), N problems first; got {', '.join(map(str, shapes))}. "
            "A single map needs .unsqueeze(0)."
        )
