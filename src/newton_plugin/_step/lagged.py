"""``sync="lagged"``: a step uses the sums over the ranks of the step before, and waits for none.

=======================================  ==================================================================
of the step before, of all ranks         of this batch, of this rank
=======================================  ==================================================================
``mean |g|^2``, from which C is made     the gradients, and each sample's own ``g_i g_i'``
the gain of each layer, where the loss   whether gradients and steps are finite: a rank keeps its own
has one size for several                 gradient where one is not, whatever the others do
=======================================  ==================================================================

Sums that are not finite are passed over: the step after uses those before. All ranks still take in the same sums in the
same order, so their running states are the same to the bit. The first step of a layer waits, as with ``sync=True``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from newton_plugin._curvature.statistics import Answered, Statistics
from newton_plugin._errors import ArgumentError
from newton_plugin._runtime.processes import ROOM, ProcessGroup
from newton_plugin._step.exchange import Exchange, Layer, flat, statistics_of, telling
from newton_plugin._step.rule import StepRule
from newton_plugin._step.settings import RuleSettings

__all__ = ["LaggedExchange"]

_NUMBERS = 4  # of a layer: total, count and the two sums of its gain


class LaggedExchange:
    """An :class:`Exchange` whose answers are those of the step before; its own arrive before the next.

    Args:
        layers, what, settings, group, like: see :class:`Exchange`.

    Raises:
        RanksDisagreeError: on every rank, if the ranks did not agree at the step before.
    """

    def __init__(
        self, layers: Sequence[Layer], what: str, settings: RuleSettings, group: ProcessGroup, like: Tensor
    ) -> None:
        group.settle()
        self._what = what
        self._group = group
        self._rules = [layer.rule for layer in layers]
        self._first: Exchange | None = None
        with telling(like, settings):
            if len(layers) * _NUMBERS > ROOM:
                raise ArgumentError(
                    f"sync='lagged' takes a loss of up to {ROOM // _NUMBERS} layers; got {len(layers)}. Use sync=True."
                )
            before = [rule.summed for rule in self._rules]
            if any(summed is None for summed in before):
                what += " (its first step with sync='lagged')"
                self._named: list[Statistics] = []
            else:
                self._named = [s for layer in layers if (s := statistics_of(layer, group)) is not None]
        if not self._named:
            self._first = Exchange(layers, what, settings, group, like)
            self.ranks = self._first.ranks
            self._sums = torch.zeros(len(layers), 2, dtype=torch.float64)
            return
        group.device = like.device
        self._sums = self._named[0].total.new_zeros(len(layers), 2)
        self._before = [summed.to(s.total) for summed, s in zip(before, self._named, strict=True) if summed is not None]
        self.ranks = [
            Answered(group, s, summed[0], covers=False) for s, summed in zip(self._named, self._before, strict=True)
        ]

    def gains(self, sums: Tensor) -> Tensor:
        """See :meth:`Exchange.gains`: of the step before."""
        if self._first is not None:
            self._sums = self._first.gains(sums)
            return self._sums
        self._sums = sums
        return torch.stack([summed[1:].to(sums) for summed in self._before])

    def end(self) -> None:
        """Send the sums of this step, for the next."""
        if self._first is not None:
            for rule, ranks, sums in zip(self._rules, self.ranks, self._sums, strict=True):
                mean = ranks.answer
                assert mean is not None
                rule.summed = torch.cat([mean.reshape(1), sums.to(mean)])
            return
        rules = self._rules
        device = self._group.device or self._sums.device
        numbers = torch.cat([flat(self._named, device), self._sums.reshape(-1).to(device)])
        self._group.start(self._what, numbers, lambda sums: _deliver(rules, sums))


def _deliver(rules: Sequence[StepRule], sums: Tensor) -> None:
    """What :meth:`LaggedExchange.end` has sent, summed over the ranks, to the rules."""
    totals, gains = sums.split(2 * len(rules))
    for rule, (total, count), own in zip(rules, totals.view(-1, 2), gains.view(-1, 2), strict=True):
        new = torch.cat([(total / count.clamp_min(1)).reshape(1), own])
        old = rule.summed
        rule.summed = new if old is None else torch.where(torch.isfinite(new[0]), new, old.to(new))
