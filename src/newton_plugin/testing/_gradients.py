"""What the gradients of one batch say: who decides it (tail), whether directions differ (spread), who has no say."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from newton_plugin._doors.last_step import LastStep, spread_of
from newton_plugin.testing._report import Finding, skipped
from newton_plugin.testing._subject import Subject

__all__ = ["ignored", "spread", "tail"]


def _step(rows: Tensor) -> LastStep:
    squared = rows.square().sum(-1).mean()
    return LastStep("outputs", len(rows), rows, squared, squared, None, {})


def tail(rows: Tensor) -> Finding:
    """The share of the squared gradients that a tenth of the samples holds; rows (N, m)."""
    held = float(_step(rows).tail)
    if math.isnan(held):
        return skipped("pass ten samples or more that have a gradient")
    words = "of the squared gradients are a tenth of the samples'"
    if held >= 0.5:
        return Finding("note", f"{100 * held:.0f} %", f"{words}: few samples decide this batch", number=held)
    return Finding("ok", f"{100 * held:.0f} %", words, number=held)


def spread(rows: Tensor) -> Finding:
    """The largest eigenvalue of ``mean g g'`` over the mean of the others; rows (N, m)."""
    if rows.shape[1] == 1:
        return skipped("one feature has one direction")
    moment = _step(rows).second_moment
    if moment is None:
        return skipped("128 features at most, or 128 samples")
    number = spread_of(torch.linalg.eigvalsh(moment).cpu())
    if math.isnan(number):
        return skipped("no sample has a gradient")
    words = "the largest eigenvalue of mean g g' over the mean: 1 where all directions are alike"
    if len(rows) < 4 * rows.shape[1]:
        words += f". Of {len(rows)} samples with {rows.shape[1]} features, which makes it larger than it is"
    return Finding("ok", f"{number:.1f}", words, number=number)


def ignored(subject: Subject, gradient: Tensor) -> Finding:
    """Rows whose gradient is zero: at these outputs, or wherever they move. See docs/check-loss.md."""
    rows = subject.layout.to_rows(gradient)
    still = ~rows.ne(0).any(-1)
    count, of = int(still.sum()), len(rows)
    if count in (0, of):
        return Finding("ok", "all") if not count else skipped("no row has a gradient")
    y, generator = subject.outputs, torch.Generator().manual_seed(4)
    # A loss may be defined only near these outputs. Both ways: a flat side, as that of a hinge, ends on one.
    for far in (10.0, 10.0, 10.0, 1.0, 0.1, 1e-3):
        move = far * torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) * y.std().clamp_min(1e-3)
        for sign in (1, -1):
            try:
                elsewhere = subject.layout.to_rows(subject.gradient(y + sign * move))
            except Exception:  # it cannot be evaluated there
                continue
            if bool(torch.isfinite(elsewhere).all()):
                still &= ~elsewhere.ne(0).any(-1)
    ever = int(still.sum())
    if ever:
        return Finding(
            "note",
            "some ignored",
            f"{of - ever} of {of}: the others have no gradient wherever they move (ignore_index, a mask, padding), and "
            "do not count in the means of the package either",
            number=float(ever),
        )
    return Finding(
        "note", "some flat", f"all, but {count} of {of} have no gradient at these outputs", number=float(count)
    )
