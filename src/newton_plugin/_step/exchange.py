"""What travels between the processes at one step: one all-reduce, and where that does not do, a second.

===========================================  ==============================================  ========================
the curvature of a layer                     with the agreement                              then, for all layers
===========================================  ==============================================  ========================
Fisher, isotropic or one for each sample;    ``sum_i |g_i|^2`` and N                         nothing
"norm"
Fisher, gated                                nothing                                         ``sum_i |g_i|^2``, then
                                                                                             sums at the layer
Fisher with a matrix                         nothing                                         ``sum_i g_i g_i'``
Hessian                                      what this rank knows of it                      C, layer by layer
"auto", one of a user's own                  nothing                                         what it asks for
===========================================  ==============================================  ========================

One size for several layers takes one more; see ``compute.py``. The agreement has a fixed size and is the first thing
that a rank does at a step, so ranks that find something else meet there. Where a few numbers are all that is needed, it
goes from device to device, and nobody waits for it: see ``later`` in
:meth:`newton_plugin._runtime.processes.ProcessGroup.exchange`. Elsewhere it decides the size of what follows, and goes
between the hosts.

Nothing is hidden behind the backward pass: between the end of the hook and the first use of a step are 0.1 ms, and one
all-reduce over gloo takes 0.4 and more. Errors would come from within the backward pass. ``lagged.py`` hides it all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from newton_plugin._curvature.protocol import HVP
from newton_plugin._curvature.statistics import Answered, Statistics
from newton_plugin._linalg.damped_inverse import working_dtype
from newton_plugin._runtime.processes import ROOM, ProcessGroup, Ranks, current_ranks
from newton_plugin._step.rule import StepRule
from newton_plugin._step.settings import RuleSettings

__all__ = ["Exchange", "Layer", "flat", "statistics_of", "tell", "telling", "waits_for_news"]

_CODES = 6  # of Curvature.knowledge


class Layer(Protocol):
    """The rows of one layer in one loss, as ``compute.py`` has them."""

    @property
    def rule(self) -> StepRule: ...

    @property
    def batch(self) -> Tensor:
        """(N, m), as the rule takes them."""
        ...

    @property
    def hessians(self) -> HVP | None: ...

    @property
    def groups(self) -> int: ...

    @property
    def counted(self) -> Tensor:
        """The rows that have a gradient, no dimensions."""
        ...


def tell(what: str, like: Tensor, settings: RuleSettings) -> None:
    """Take part in the exchange of a step that this rank does not take; raises with the others if they take one.

    Args:
        what: why not.
        like: a tensor on the device where the step would have been, if no step before this one tells.
        settings: those of all ranks.
    """
    ranks = current_ranks(settings.sync)
    if isinstance(ranks, ProcessGroup) and not (settings.one_number or settings.names_knowledge):
        ranks.agree(what)
    elif isinstance(ranks, ProcessGroup):
        numbers = _no_numbers(ranks.device or like.device, settings)
        ranks.exchange(what, numbers, waits_for_news(numbers.device, settings))


@contextmanager
def telling(like: Tensor, settings: RuleSettings) -> Iterator[None]:
    """Inside, an error of this rank alone does not keep the others waiting: it is told, and raised."""
    try:
        yield
    except Exception as error:
        tell(f"{type(error).__name__}: {error}", like, settings)
        raise


def waits_for_news(device: torch.device, settings: RuleSettings) -> bool:
    """Whether a step goes on before it knows whether the ranks agree; the same on all ranks."""
    unread = settings.sync == "lagged" or device.type != "cpu"
    return settings.one_number and unread and settings.on_nonfinite == "keep"


class Exchange:
    """What the layers of one loss have exchanged.

    Args:
        layers: of the loss.
        what: that all ranks have to agree on.
        settings: those of the loss.
        group: all processes.
        like: the loss.

    Attributes:
        ranks: of each layer, for its step.
    """

    def __init__(
        self, layers: Sequence[Layer], what: str, settings: RuleSettings, group: ProcessGroup, like: Tensor
    ) -> None:
        self.ranks: list[Answered]
        self._group = group
        self._agreed: Tensor | None = None
        self._read: bool | None = None
        group.device = device = like.device
        if settings.one_number:
            with telling(like, settings):
                named = [statistics_of(layer, group) for layer in layers]
            means = self._numbers(what, named, device, waits_for_news(device, settings))
            self.ranks = [Answered(group, known, mean) for known, mean in zip(named, means, strict=True)]
            return
        self.ranks = [Answered(group, worst=worst) for worst in self._decisions(layers, what, settings, like)]
        named = [statistics_of(layer, ranks) for layer, ranks in zip(layers, self.ranks, strict=True)]
        for ranks, known, mean in zip(self.ranks, named, _means(named, group.sum, device), strict=True):
            ranks.known, ranks.answer = known, mean

    @property
    def goes_on(self) -> bool:
        """Whether more may be exchanged: the ranks agree. Waits for the device if that has not been read."""
        if self._read is None:
            self._read = self._agreed is None or bool(self._agreed)
        return self._read

    def gains(self, sums: Tensor) -> Tensor:
        """Of all layers, (K, 2), their sums over the ranks: the second all-reduce of a step; see ``compute.py``."""
        return self._group.sum(sums) if self.goes_on else torch.full_like(sums, math.nan)

    def end(self) -> None:
        """All is done."""

    def _numbers(
        self, what: str, named: Sequence[Statistics | None], device: torch.device, later: bool
    ) -> Sequence[Tensor]:
        """The means that the layers have named, one number each, by the first all-reduce."""
        numbers = flat([s for s in named if s is not None], device)
        sums, self._agreed = self._group.exchange(what, numbers[:ROOM], later)
        if len(numbers) > ROOM:
            rest = numbers[ROOM:]
            sums = torch.cat([sums, self._group.sum(rest) if self.goes_on else torch.full_like(rest, math.nan)])
        pairs = sums.view(-1, 2)
        means = (pairs[:, 0] / pairs[:, 1].clamp_min(1)).unbind()
        return [mean if s is None else mean.to(s.total.device) for mean, s in zip(means, named, strict=True)]

    def _decisions(self, layers: Sequence[Layer], what: str, settings: RuleSettings, like: Tensor) -> list[int | None]:
        """Let the hosts agree. For each layer the worst that any rank knows of its Hessians; None: nobody has said."""
        if not settings.names_knowledge:
            self._group.agree(what)
            return [None] * len(layers)
        with telling(like, settings):
            codes = [_knowledge(layer) for layer in layers[: ROOM // _CODES]]
        numbers = [float(code == c) for code in codes for c in range(_CODES)]
        sums = self._group.exchange(what, torch.tensor(numbers, dtype=torch.float64))[0].tolist()
        have = [sums[k * _CODES : (k + 1) * _CODES] for k in range(len(codes))]
        worst = [None if code is None else max(c for c in range(_CODES) if have[k][c]) for k, code in enumerate(codes)]
        return worst + [None] * (len(layers) - len(codes))


def statistics_of(layer: Layer, ranks: Ranks) -> Statistics | None:
    rule = layer.rule
    if not rule.curvature.names_statistics:
        return None
    return rule.curvature.statistics(layer.batch, rule.damping, ranks, layer.groups, layer.counted)


def _knowledge(layer: Layer) -> int | None:
    curvature = layer.rule.curvature
    if not curvature.names_knowledge:
        return None
    return curvature.knowledge(layer.batch, layer.hessians, layer.rule.damping, layer.groups)


def _no_numbers(device: torch.device, settings: RuleSettings) -> Tensor:
    """An empty tensor where the exchange of a step takes place."""
    on = device if settings.one_number else torch.device("cpu")
    return torch.empty(0, dtype=working_dtype(on), device=on)


def flat(named: Sequence[Statistics], device: torch.device) -> Tensor:
    """All totals and counts, one after the other, on one device."""
    parts: list[Tensor] = []
    for s in named:
        count = s.count.to(s.total) if isinstance(s.count, Tensor) else s.total.new_full((), s.count)
        parts += [s.total, count]
    if all(part.ndim == 0 for part in parts):
        return torch.stack([part.to(device) for part in parts])
    return torch.cat([part.reshape(-1).to(device) for part in parts])


def _means(
    named: Sequence[Statistics | None], summed: Callable[[Tensor], Tensor], device: torch.device
) -> list[Tensor | None]:
    """The mean of each: its total over its count, both summed over the ranks."""
    given = [s for s in named if s is not None]
    if not given:
        return [None] * len(named)
    shapes = [shape for s in given for shape in (s.total.shape, s.count.shape if isinstance(s.count, Tensor) else ())]
    sums = summed(flat(given, device)).split([math.prod(shape) for shape in shapes])
    numbers = iter(part.view(shape) for part, shape in zip(sums, shapes, strict=True))
    return [None if s is None else (next(numbers) / next(numbers).clamp_min(1)).to(s.total.device) for s in named]
