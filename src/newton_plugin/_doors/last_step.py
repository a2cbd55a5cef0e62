"""The last step at each boundary, as tensors that stay where they are: for pictures and for summaries of a training.

Nothing here waits for the device. ``diagnostics.py`` reads the same numbers for people, and waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from newton_plugin._linalg.large_rows import squared_norms
from newton_plugin._step.rule import StepRule

__all__ = ["LastStep", "last_steps", "mean_squares", "spread_of"]

MOST_VALUES = 128  # of samples or of features: a second moment of 128 x 128 is of 128 KiB


@dataclass(frozen=True)
class LastStep:
    """The last step at one boundary. Tensors stay on their device.

    Attributes:
        name: of the boundary.
        samples: N.
        gradients: the per-sample gradients ``g_i``, (N, m); None where nobody keeps them: large ones, "norm".
        gradient_square, step_square: the means over the samples of ``|g_i|^2`` and ``|step_i|^2``; no dimensions.
        curvature: C as it was used: see ``CurvatureStep.matrix``; None where it was never formed.
        readings: further numbers of the rule, without dimensions, by name.
    """

    name: str
    samples: int
    gradients: Tensor | None
    gradient_square: Tensor
    step_square: Tensor
    curvature: Tensor | None
    readings: Mapping[str, Tensor]

    @cached_property
    def sizes(self) -> Tensor | None:
        """``|g_i|`` of every sample, (N,); None without gradients."""
        return None if self.gradients is None else squared_norms(self.gradients).sqrt()

    @property
    def tail(self) -> Tensor:
        """The share of ``sum_i |g_i|^2`` that a tenth of the samples holds, rounded down; no dimensions.

        Samples without a gradient do not count. NaN with fewer than ten that have one, and without gradients.
        """
        if self.sizes is None:
            return torch.full_like(self.gradient_square, torch.nan)
        sums = self.sizes.square().sort(descending=True).values.cumsum(0)
        tenth = (self.sizes > 0).sum() // 10
        if not len(sums):
            return self.gradient_square.new_full((), torch.nan)
        held = sums.gather(0, (tenth - 1).clamp_min(0).reshape(1))[0] / sums[-1]
        return torch.where(tenth > 0, held, torch.nan)

    @staticmethod
    def spread_of(values: Tensor) -> float:
        """See :func:`spread_of`: for eigenvalues of a :attr:`second_moment` that was kept."""
        return spread_of(values)

    @property
    def second_moment(self) -> Tensor | None:
        """A matrix with the eigenvalues of ``1/N sum_i g_i g_i'`` (but for zeros), (k, k) with k = min(N, m).

        None without gradients, and above 128 of both samples and features.
        """
        if self.gradients is None or not 0 < min(self.gradients.shape) <= MOST_VALUES:
            return None
        g = self.gradients if self.gradients.device.type == "mps" else self.gradients.double()
        return (g.mT @ g if g.shape[0] >= g.shape[1] else g @ g.mT) / len(g)


def spread_of(values: Tensor) -> float:
    """The largest eigenvalue over the mean of those that are not zero; NaN if there are none, or not finite.

    Args:
        values: eigenvalues of a second moment, (k,), on the host, in the dtype in which they were computed.
    """
    if not len(values) or not bool(torch.isfinite(values).all()) or not bool(values.max() > 0):
        return float("nan")
    counted = values > (1e-9 if values.dtype == torch.float64 else 1e-5) * values.max()
    return float(values.max() / values[counted].mean())


def last_steps(names: Sequence[str], rules: Sequence[StepRule]) -> tuple[LastStep, ...]:
    """Of the boundaries of the last loss, those that have taken a step."""
    return tuple(_of(name, rule) for name, rule in zip(names, rules, strict=True) if rule.last is not None)


def _of(name: str, rule: StepRule) -> LastStep:
    last = rule.last
    assert last is not None
    g = rule.last_gradient
    if g is not None and rule.last_weight is not None:
        g = g / rule.last_weight.reshape(1)
    squared, stepped = mean_squares(rule)
    return LastStep(name, len(last.step), g, squared, stepped, last.matrix, dict(last.readings))


def mean_squares(rule: StepRule) -> tuple[Tensor, Tensor]:
    """The means over the samples of ``|g_i|^2`` and ``|step_i|^2`` at the last step of a rule; no dimensions."""
    last = rule.last
    assert last is not None
    if last.sizes is not None:
        squared, stepped = last.sizes()
    else:
        assert rule.last_gradient is not None
        squared, stepped = squared_norms(rule.last_gradient).sum(), squared_norms(last.step).sum()
        if rule.last_weight is not None:
            squared, stepped = squared / rule.last_weight.square(), stepped / rule.last_weight.square()
    count = max(1, last.step.shape[0])
    if rule.last_factor is not None:
        stepped = stepped * rule.last_factor.square()
    taken = last.finiteness.taken
    stepped = stepped if taken is None else torch.where(taken, stepped, squared)
    return squared / count, stepped / count
