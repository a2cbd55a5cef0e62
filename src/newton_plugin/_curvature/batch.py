"""What one step of a curvature is made from, in one object."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from newton_plugin._curvature.damping import Damping
from newton_plugin._curvature.running_mean import RunningMean
from newton_plugin._linalg.large_rows import squared_norms
from newton_plugin._runtime.processes import Ranks

__all__ = ["Batch"]


@dataclass(frozen=True)
class Batch:
    """The gradients of one batch, and how its C is averaged.

    Attributes:
        gradient: rows (N, m): the per-sample gradients, times w where they are streamed.
        damping: the rule for the damping, which also says how C is averaged over batches.
        ranks: the processes that share the batch.
        groups: blocks of C; rows of one sample.
        unit: ``w^2``, no dimensions; None: 1.
        live: the number of rows that have a gradient, no dimensions; None: all. What a loss ignores (padding, say) has
            none, and does not count in a mean over samples.
        factor: by which the steps are multiplied before they are rounded, no dimensions; None: 1.
    """

    gradient: Tensor
    damping: Damping
    ranks: Ranks
    groups: int = 1
    unit: Tensor | None = None
    live: Tensor | None = None
    factor: Tensor | None = None

    @property
    def samples(self) -> Tensor | int:
        """The number of samples in a mean over them."""
        return len(self.gradient) if self.live is None else self.live

    @property
    def samples_of_groups(self) -> Tensor | int:
        """The same for each group: without dimensions, or (T, 1, 1) to divide T matrices."""
        if self.groups == 1:
            return self.samples
        n = len(self.gradient) // self.groups
        if self.live is None:
            return n
        return self.gradient.any(-1).reshape(n, self.groups).sum(0).clamp_min(1).reshape(-1, 1, 1)

    @property
    def averages(self) -> bool:
        """Whether C is averaged over batches."""
        return self.damping.averaging.decay > 0

    @property
    def own(self) -> float:
        """The weight of a sample's own ``g_i g_i'`` beside C, for power 1."""
        m = self.gradient.shape[1]
        return self.damping.averaging.own / m if m else 0.0

    def averaged(self, mean: RunningMean, value: Tensor) -> Tensor:
        """The running mean after ``value`` of this batch."""
        average = self.damping.averaging
        return mean.update(value, average.decay, average.growth)

    def in_units(self, squares: Tensor) -> Tensor:
        """Sums of squares of the gradients, from those of the rows."""
        return squares if self.unit is None else squares / self.unit

    def squared_norms(self) -> Tensor:
        """``|g_i|^2``, (N,)."""
        return self.in_units(squared_norms(self.gradient))

    def squares(self) -> tuple[Tensor, Tensor]:
        """``|g_i|^2``, (N,), and their sum, no dimensions."""
        known = self.ranks.known
        if known is not None and known.squared is not None:
            return known.squared, known.total
        squared = self.squared_norms()
        return squared, squared.sum()
