"""Numbers about the last step, for people and loggers."""

from __future__ import annotations

from collections.abc import Iterable

from newton_plugin._linalg.large_rows import row_lengths
from newton_plugin._step.rule import StepRule

__all__ = ["diagnostics"]


def diagnostics(used: Iterable[StepRule], rules: Iterable[StepRule], skipped: int = 0) -> dict[str, float]:
    """See :meth:`newton_plugin.LossHook.diagnostics`. Waits for the device.

    Args:
        used: the rules of the last step.
        rules: all there are.
        skipped: batches without a boundary.
    """
    last = [(rule, rule.last) for rule in used if rule.last is not None]
    if not last:
        return {}
    lows, highs = zip(*(step.extremes() for _, step in last), strict=True)
    gradients, steps = zip(*(_mean_squares(rule) for rule, _ in last), strict=True)
    return {
        "gradient_norm": sum(gradients) ** 0.5,
        "step_norm": sum(steps) ** 0.5,
        "eig_min": min(float(v) for v in lows),
        "eig_max": max(float(v) for v in highs),
        "damping": max(float(step.damping) for _, step in last),
        "fallbacks": float(skipped + sum(r.fallbacks for r in rules)),
    }


def _mean_squares(rule: StepRule) -> tuple[float, float]:
    """Mean over the samples of the last ``|g_i|^2`` and ``|step_i|^2``."""
    last, count = rule.last, 1
    assert last is not None
    sizes = getattr(last, "sizes", None)
    if sizes is not None:
        squared, taken = sizes()
    else:
        assert rule.last_gradient is not None
        squared, taken = row_lengths(rule.last_gradient).sum(), row_lengths(last.step).sum()
        if rule.last_weight is not None:
            squared, taken = squared / rule.last_weight.square(), taken / rule.last_weight.square()
    count = max(1, last.step.shape[0])
    fine = last.fine is None or bool(last.fine)
    return float(squared) / count, float(taken if fine else squared) / count
