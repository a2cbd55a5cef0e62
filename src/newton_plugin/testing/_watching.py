"""Plain steps that are looked at: a curvature that changes nothing, and what is kept of what it saw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from newton_plugin._curvature.damping import Damping
from newton_plugin._curvature.gated import GatedFisher
from newton_plugin._curvature.head_sums import HeadRows
from newton_plugin._curvature.protocol import HVP, CurvatureStep
from newton_plugin._doors.last_step import LastStep, spread_of
from newton_plugin._runtime.processes import ONE_PROCESS, Ranks

__all__ = ["Watched", "Watching"]

_MOST_FEATURES = 128  # a second moment of so many features is kept for every step


class Watching(GatedFisher):
    """Training with it is plain training: every gradient stays as it is, and what ``structure="gated"`` reads is read.

    Give it to any door as ``curvature=``; read ``diagnostics()`` and ``last_steps``.
    """

    def step(  # type: ignore[override]  # the rows are never streamed
        self,
        gradient: Tensor,
        hvp: HVP | None,
        damping: Damping,
        ranks: Ranks = ONE_PROCESS,
        live: Tensor | None = None,
        head: HeadRows | None = None,
    ) -> CurvatureStep:
        """See :meth:`newton_plugin.Curvature.step`: the step is the gradient."""
        read = super().step(gradient, hvp, damping, ranks, live=live, head=head)
        return replace(read, step=gradient, sizes=None)


@dataclass(frozen=True)
class _Seen:
    """One step, on the host.

    Attributes:
        square: ``sum_i |g_i|^2``.
        sizes: ``|g_i|``, (N,); None where no gradients were kept.
        moment: ``mean g g'``, (m, m); the same eigenvalues in another matrix, or None, for wide outputs.
        pooled: whether moments of several steps may be averaged.
        readings: of the rule, by name.
    """

    square: float
    sizes: Tensor | None
    moment: Tensor | None
    pooled: bool
    readings: dict[str, float]


class Watched:
    """The steps at one boundary."""

    def __init__(self) -> None:
        self._steps: list[_Seen] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, last: LastStep) -> None:
        """Keep what is needed of a step. Waits for the device."""
        g = last.gradients
        pooled = g is not None and g.shape[1] <= _MOST_FEATURES
        moment = None
        if g is not None:
            moment = (g.mT @ g / max(1, len(g))) if pooled else last.second_moment
        self._steps.append(
            _Seen(
                float(last.gradient_square) * last.samples,
                None if last.sizes is None else last.sizes.double().cpu(),
                None if moment is None else moment.double().cpu(),
                pooled,
                {name: float(value) for name, value in last.readings.items()},
            )
        )

    @property
    def square(self) -> float:
        """``sum_i |g_i|^2`` of all steps together."""
        return sum(seen.square for seen in self._steps)

    def sizes(self, late: bool) -> Tensor:
        """``|g_i|`` of all samples of the first third of the steps, or of the last; empty where none were kept."""
        kept = [seen.sizes for seen in self._third(late) if seen.sizes is not None]
        return torch.cat(kept) if kept else torch.empty(0, dtype=torch.float64)

    def tail(self, late: bool = True) -> float:
        """The share of a third of the steps' squared gradients that a tenth of the samples holds; NaN: unknown."""
        rows = self.sizes(late).unsqueeze(1)
        nothing = rows.new_zeros(())
        return float(LastStep("", len(rows), rows, nothing, nothing, None, {}).tail)

    def spread(self, late: bool = True) -> float:
        """Of a third of the steps, the largest eigenvalue of ``mean g g'`` over the mean of all; NaN: unknown."""
        steps = [seen for seen in self._third(late) if seen.moment is not None]
        moments = [seen.moment for seen in steps if seen.moment is not None]
        if not moments:
            return math.nan
        if all(seen.pooled and m.shape == moments[0].shape for seen, m in zip(steps, moments, strict=True)):
            return spread_of(torch.linalg.eigvalsh(torch.stack(moments).mean(0)))
        found = sorted(spread_of(torch.linalg.eigvalsh(m)) for m in moments)
        return found[len(found) // 2]

    def reading(self, name: str) -> float:
        """The mean of a reading over the last third of the steps; NaN where it was never read."""
        values = [value for seen in self._third(True) if not math.isnan(value := seen.readings.get(name, math.nan))]
        return sum(values) / len(values) if values else math.nan

    def eigenvalues(self) -> list[Tensor]:
        """Of ``mean g g'`` at every step, rising; empty ones where it was not kept."""
        empty = torch.empty(0, dtype=torch.float64)
        return [empty if seen.moment is None else torch.linalg.eigvalsh(seen.moment) for seen in self._steps]

    def _third(self, late: bool) -> Sequence[_Seen]:
        count = max(1, len(self._steps) // 3)
        return self._steps[-count:] if late else self._steps[:count]
