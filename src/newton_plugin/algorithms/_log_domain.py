"""Stable logarithms of a row-softmax and of its complement.

Binary cross-entropy between a soft permutation matrix ``P`` and the true one needs ``log P`` and
``log(1 - P)``. Taken from ``P`` itself they are lost as soon as ``P`` rounds to 0 or 1, which in float32
happens at a logit difference of 17: ``log1p(-P)`` is then infinite, or clipped to a constant with a gradient
that has nothing to do with the loss. Taken from the logits they are never lost.

In a row of logits ``z``, let ``z_1`` be the largest entry and ``z_2`` the second largest. Everything is written
relative to these two, so that each exponential is at most 1 and each logarithm is a ``log1p`` of something
positive::

    x_k   = exp(z_k - z_2)                     the entries after the first two
    rest  = exp(z_2 - z_1) (1 + sum_k x_k)     sum of all entries but the first, relative to the first
    log P_k       = (z_k - z_1) - log1p(rest)              for every k (the first term is exactly 0 for k = 1)
    log(1 - P_k)  = log1p(-P_k)                            k not first: P_k <= 1/2, nothing cancels
    log(1 - P_1)  = log(rest) - log1p(rest)
    log(rest)     = (z_2 - z_1) + log1p(sum_k x_k)         never the logarithm of something rounded

This is the log-sum-exp over the *other* entries of the row; it costs one exponential per entry. The two reference
entries enter as constants (``x_1 = 0``, ``x_2 = 1``, ``z_1 - z_1 = 0``, set by a mask and not by subtraction). So
no large terms cancel in the first and second derivatives either: a Hessian of 1e-30 comes out as 1e-30 and not as
the rounding error of 1 - 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["can_look", "log_softmax_and_complement", "log_zero", "wide"]


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in float64, or in float32 where the device has no float64."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def can_look(tensor: Tensor) -> bool:
    """Whether the host can read values of ``tensor`` at once.

    Not on a device, where it would wait; not in compiled code or inside a transform of ``torch.func``, where there are
    none yet.
    """
    if torch.compiler.is_compiling() or tensor.device.type != "cpu" or type(tensor) is not Tensor:
        return False
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 - no type stubs for it
    return functorch.peek_interpreter_stack() is None


def log_zero(tensor: Tensor) -> float:
    """What stands for log 0 in this dtype: finite, and below the logarithm of every probability that occurs."""
    return -1e300 if tensor.dtype == torch.float64 else -1e30


def log_softmax_and_complement(logits: Tensor) -> tuple[Tensor, Tensor]:
    """``(log P, log(1 - P))`` for ``P = softmax(logits, dim=-1)``, both stable, in the dtype of ``logits``.

    Args:
        logits: (..., m) with m >= 2 and finite entries.

    >>> log_p, log_q = log_softmax_and_complement(torch.tensor([0.0, -1000.0], dtype=torch.float64))
    >>> log_p.tolist()
    [0.0, -1000.0]
    >>> torch.equal(log_q, log_p.flip(0))
    True
    """
    two = logits.detach().topk(2, dim=-1).indices
    column = torch.arange(logits.shape[-1], device=logits.device)
    first, second = column == two[..., :1], column == two[..., 1:]
    z1, z2 = logits.gather(-1, two).split(1, -1)

    x = torch.exp((logits - z2).masked_fill(first | second, -torch.inf))
    tail = x.sum(-1, keepdim=True)
    gap = z2 - z1
    ratio = torch.exp(gap)
    rest = ratio * (1 + tail)
    log_total = torch.log1p(rest)
    not_first = torch.where(second, 1.0, x) * (ratio / (1 + rest))
    log_p = (logits - z1).masked_fill(first, 0.0) - log_total
    log_q = torch.where(first, gap + torch.log1p(tail) - log_total, torch.log1p(-not_first))
    return log_p, log_q
