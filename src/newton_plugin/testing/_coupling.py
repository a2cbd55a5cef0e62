"""Whether the samples of a batch are independent, and along which dimension of the outputs they lie."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from newton_plugin._boundary.rows import RowLayout
from newton_plugin.testing._reasons import in_plain_words
from newton_plugin.testing._report import Finding, skipped
from newton_plugin.testing._subject import Subject

__all__ = ["coupling"]

_INDEPENDENT = {torch.float64: 1e-8}  # of the change of the others' gradients, over how far samples were moved


def coupling(subject: Subject, gradient: Tensor) -> Finding:
    """Whether the gradients of some samples change when others move. No second derivative is needed."""
    layout = subject.layout
    if layout.rows < 2:
        return skipped("one sample alone cannot tell; pass a batch of two or more")
    reason = "it is NaN or infinite there"
    for far in (0.1, 1e-3, 1e-5):  # a loss may be defined only near these outputs
        try:
            change = _change_of_others(subject, layout, gradient, far)
            if not math.isfinite(change):
                continue
            if _is_little(change, far, subject):
                return Finding("ok", "independent")
            return _coupled(change, _other_axes(subject, gradient, far))
        except Exception as error:
            reason, _ = in_plain_words(error)
    return skipped(f"the loss cannot be evaluated around these outputs: {reason}")


def _is_little(change: float, far: float, subject: Subject) -> bool:
    return change <= _INDEPENDENT.get(subject.outputs.dtype, 1e-3) * far


def _other_axes(subject: Subject, gradient: Tensor, far: float) -> tuple[int, ...]:
    """The dimensions along which rows are independent, one by one, where those of the layout are coupled."""
    found, ndim = [], subject.outputs.ndim
    for axis in range(ndim):
        features = tuple(d for d in range(ndim) if d != axis)
        if axis in subject.layout.sample_axes or not features or subject.outputs.shape[axis] < 2:
            continue
        layout = RowLayout(subject.layout.shape, features)
        if _is_little(_change_of_others(subject, layout, gradient, far), far, subject):
            found.append(axis)
    return tuple(found)


def _coupled(change: float, axes: tuple[int, ...]) -> Finding:
    words = (
        f"moving some samples' outputs changes the gradients of others (by {change:.1e} relative), so no sample has a "
        "Hessian of its own"
    )
    found = Finding(
        "note",
        "coupled",
        words,
        "use curvature='fisher' or 'norm'; if each sample is several rows of the outputs, name feature_dims",
        number=change,
    )
    if not axes:
        return found
    dims = " or ".join(map(str, axes))
    return replace(
        found,
        words=f"{words}. Along dimension {dims} they are independent: samples seem to lie there, unless the loss "
        "mixes them feature by feature (BatchNorm)",
        remedy=f"put the samples first, outputs.movedim({axes[0]}, 0), or name the other dimensions by feature_dims",
    )


def _change_of_others(subject: Subject, layout: RowLayout, gradient: Tensor, far: float) -> float:
    """The largest change of a sample's gradient while that sample stays and others move, over the gradient's size.

    For each binary digit of the samples' numbers, the samples with a 1 there move, then those with a 0. Any two numbers
    differ in one of the log2 N digits, so each sample moves once while the other stays.
    """
    y, reference = layout.to_rows(subject.outputs), layout.to_rows(gradient)
    generator = torch.Generator().manual_seed(2)
    moves = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
    moves = moves * far * y.std().clamp_min(1e-3)
    worst = torch.zeros(()).to(y)
    for digit in range((len(y) - 1).bit_length()):
        ones = ((torch.arange(len(y), device=y.device) >> digit) & 1 == 1).unsqueeze(1)
        for moved in (ones, ~ones):
            there = layout.from_rows(torch.where(moved, y + moves, y))
            changed = (layout.to_rows(subject.gradient(there)) - reference).abs()
            if not bool(torch.isfinite(changed).all()):
                return math.nan
            worst = torch.maximum(worst, torch.where(moved, 0.0, changed).max())
    size = float(gradient.norm()) / layout.rows**0.5
    return float(worst) / max(size, 1e-300)
