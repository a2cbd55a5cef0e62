"""Is the loss a mean or a sum over its samples? A batch twice over has the same mean and twice the sum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from newton_plugin._boundary.autograd_graph import reduction_of
from newton_plugin.testing._report import Finding, skipped
from newton_plugin.testing._subject import Subject

__all__ = ["reduction"]


def reduction(subject: Subject) -> Finding:
    """How the loss adds up its samples, against what was told."""
    samples = subject.outputs.shape[0]
    try:
        once = subject.call(subject.outputs.clone())
        if isinstance(once, Tensor) and once.numel() > 1:
            return Finding("ok", "one loss for each sample")
        with subject.seeded():
            args, kwargs = _twice(subject.args, samples), _twice(subject.kwargs, samples)
            doubled = subject.loss_fn(_twice(subject.outputs, samples), *args, **kwargs)
        ratio = float(doubled.detach() / once.detach())
    except Exception:  # most often targets that the loss function holds
        return _by_name(subject)
    found = {1: "mean", 2: "sum"}.get(round(ratio)) if math.isfinite(ratio) else None
    if found is None or abs(ratio - round(ratio)) > 1e-4:
        return Finding("note", "neither", f"a batch twice over has {ratio:.3g} times the loss: no mean and no sum")
    return _judged(subject, found, ratio)


def _by_name(subject: Subject) -> Finding:
    """Of a loss of torch's own, which says how it adds up, or of none."""
    leaf = subject.outputs.clone().requires_grad_()
    try:
        node = subject.call(leaf).grad_fn
    except Exception:  # found elsewhere
        node = None
    found = None if node is None else reduction_of(node)
    if found is None:
        return skipped("the loss cannot be evaluated on the batch twice over; pass its targets as arguments")
    return _judged(subject, found, None)


def _judged(subject: Subject, found: str, ratio: float | None) -> Finding:
    if found == subject.reduction:
        return Finding("ok", found, number=ratio)
    return Finding(
        "note",
        found,
        f"it is the {found} over the samples, and {subject.reduction!r} was told: steps are wrong by the number of "
        "samples, squared where C is Fisher's",
        f"give reduction={found!r} to newton_plugin",
        number=ratio,
    )


def _twice(value: Any, samples: int) -> Any:
    """Tensors with a row for each sample, twice over."""
    if isinstance(value, Tensor):
        return torch.cat([value, value]) if value.ndim and value.shape[0] == samples else value.clone()
    if isinstance(value, dict):
        return {key: _twice(item, samples) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_twice(item, samples) for item in value)
    return value
