"""The words at the end of a fit: what the steps did, from the numbers that were kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import median

from newton_plugin_lightning._vitals import Vitals

__all__ = ["summary"]

_BESIDES = {"seconds", "gradient_norm", "step_norm"}


def summary(vitals: Vitals, where: str, fallbacks: int) -> str:
    """Several lines about a fit. Waits for the device.

    Args:
        vitals: what was kept.
        where: the boundaries, in words.
        fallbacks: see ``LossHook.diagnostics``.
    """
    if not vitals.taken:
        return (
            f"NewtonLosses took no step in {vitals.plain} batches: it was not enabled, or training ended before "
            "start_step."
        )
    looks = vitals.read()
    lines = [
        ("steps", f"{vitals.taken} batches took a step, {vitals.plain} stayed plain; {fallbacks} fallbacks so far"),
        ("where", where),
        *_sizes(looks),
        *((name, over_time(look[name] for look in looks)) for name in _others(looks)),
        *_time(vitals, looks),
    ]
    told = [f"  {name:<14}{words}" for name, words in lines if words]
    return "\n".join(["NewtonLosses, over this fit (log=False hides this):", *told])


def _sizes(looks: Sequence[Mapping[str, float]]) -> Iterable[tuple[str, str]]:
    if looks:
        gradient, step = (_median(look[name] for look in looks) for name in ("gradient_norm", "step_norm"))
        yield "sizes", f"gradient {gradient:.3g}, step {step:.3g} (medians of {len(looks)} batches)"


def _others(looks: Sequence[Mapping[str, float]]) -> list[str]:
    """Tail and spread, and what the rule itself reads, where every look has it."""
    names = [name for name in looks[0] if name not in _BESIDES] if looks else []
    return [name for name in names if all(name in look for look in looks)]


def over_time(values: Iterable[float]) -> str:
    """The medians of the first, middle and last third; fewer than three values as they are; empty: none is known."""
    known = [value for value in values if not math.isnan(value)]
    if len(known) < 3:
        return ", then ".join(f"{value:.3g}" for value in known)
    cuts = [round(k * len(known) / 3) for k in range(4)]
    early, middle, late = (_median(known[a:b]) for a, b in pairwise(cuts))
    return f"{early:.3g} early, {middle:.3g} in the middle, {late:.3g} late"


def _time(vitals: Vitals, looks: Sequence[Mapping[str, float]]) -> Iterable[tuple[str, str]]:
    known = [look["seconds"] for look in looks if not math.isnan(look["seconds"])]
    known = known[1:] or known  # the first step makes much ready
    if known:
        ours = 1e3 * _median(known)
        words = f"{ours:.2g} ms a batch in the hook and its part of the backward pass"
        if vitals.batches:
            words += f", of {1e3 * vitals.seconds / vitals.batches:.2g} ms"
        yield "host time", words + " (nothing waits for a device)"


def _median(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else math.nan
