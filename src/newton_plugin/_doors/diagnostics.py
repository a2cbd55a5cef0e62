"""The numbers that people and loggers read of a step.

A new logged number begins here: every key of the dictionary reaches ``LossHook.diagnostics()``,
``NewtonLoss.diagnostics()`` and, as ``newton/<key>``, the loggers of the Lightning callback and of the Trainer of
transformers. What it is computed from has to be in the :class:`CurvatureStep` of the last step or in the
:class:`StepRule`; nothing is computed before somebody asks. Keys are also listed in docstrings, documents and tests:
search for ``eig_max``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from newton_plugin._doors.last_step import mean_squares
from newton_plugin._step.rule import StepRule

__all__ = ["diagnostics"]


def diagnostics(used: Iterable[StepRule], rules: Iterable[StepRule], skipped: int = 0) -> dict[str, float]:
    """The numbers that :meth:`newton_plugin.LossHook.diagnostics` describes. Waits for the device.

    Args:
        used: the rules of the last step, one for each boundary.
        rules: the rules of all boundaries so far.
        skipped: the number of batches without a boundary.
    """
    last = [(rule, rule.last) for rule in used if rule.last is not None]
    if not last:
        return {}
    lows, highs = zip(*(step.extremes() for _, step in last), strict=True)
    gradients, steps = zip(*(map(float, mean_squares(rule)) for rule, _ in last), strict=True)
    numbers = {
        "gradient_norm": sum(gradients) ** 0.5,
        "step_norm": sum(steps) ** 0.5,
        "eig_min": min(float(v) for v in lows),
        "eig_max": max(float(v) for v in highs),
        "damping": max(float(step.damping) for _, step in last),
        "fallbacks": float(skipped + sum(r.fallbacks for r in rules)),
    }
    for name in dict.fromkeys(name for _, step in last for name in step.readings):
        known = [value for _, step in last if (value := float(step.readings.get(name, math.nan))) == value]
        numbers[name] = max(known, default=math.nan)
    return numbers
