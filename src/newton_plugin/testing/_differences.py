"""Derivatives against central differences.

``(f(y + h v) - f(y - h v)) / 2h`` differs from the derivative by truncation, which grows with h, and by rounding,
which grows as 1/h. The best h depends on the loss, so several are tried and the smallest difference counts: a right
derivative agrees at one h, a wrong one at none.

A loss may be defined on one side of the outputs only (a probability of 1, a logarithm near 0). An h that leads to an
error or to a number that is not finite is left out; where none is left, :class:`CannotMove` is raised.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from newton_plugin.testing._reasons import in_plain_words
from newton_plugin.testing._subject import Subject

__all__ = ["CannotMove", "directions", "gradient_error", "hessian_error", "is_flat", "tolerance"]

_STEPS = {torch.float64: (1e-3, 1e-4, 1e-5, 1e-6), torch.float32: (1e-1, 1e-2, 1e-3)}
_TINY = 1e-300


class CannotMove(Exception):
    """The loss cannot be evaluated around its outputs; the message says why. Caught inside this package."""


def tolerance(dtype: torch.dtype) -> float:
    """The relative error below which a derivative agrees."""
    return 1e-5 if dtype == torch.float64 else 3e-2


def directions(subject: Subject, count: int) -> Tensor:
    """Random directions (count, *shape), always the same, on average of length 1 in each sample."""
    generator = torch.Generator().manual_seed(1)
    v = torch.randn(count, *subject.outputs.shape, generator=generator, dtype=torch.float64)
    return (v / math.sqrt(subject.layout.features)).to(subject.outputs)


def gradient_error(subject: Subject, gradient: Tensor) -> float:
    """The largest relative error of ``<g, v>`` over four directions; 0 where the rounding of the loss explains it."""
    errors = []
    for v in directions(subject, 4):
        slope = float((gradient * v).sum())
        size = max(float(gradient.norm() * v.norm()) / math.sqrt(v.numel()), abs(slope), _TINY)
        best, explained = math.inf, False
        for h, up, down in _both_sides(subject, v, first_derivative=False):
            difference = abs(float(up - down) / (2 * h) - slope)
            rounding = 8 * torch.finfo(v.dtype).eps * max(abs(float(up)), abs(float(down))) / h
            best, explained = min(best, difference / size), explained or difference <= rounding
        errors.append(0.0 if explained and best > tolerance(v.dtype) else best)
    return max(errors)


def hessian_error(subject: Subject, products: Tensor) -> float:
    """The largest relative error of ``H v`` along ``directions(subject, len(products))``."""
    errors = []
    for v, product in zip(directions(subject, len(products)), products, strict=True):
        best = math.inf
        for h, up, down in _both_sides(subject, v, first_derivative=True):
            difference = (up - down) / (2 * h)
            size = max(float(difference.norm()), float(product.norm()), _TINY)
            best = min(best, float((difference - product).norm()) / size)
        errors.append(best)
    return max(errors)


def is_flat(subject: Subject, gradient: Tensor) -> bool:
    """Whether the gradient does not change along random directions, as that of a piecewise linear loss."""
    size = float(gradient.norm()) / max(float(subject.outputs.norm()), 1e-3)
    little = 1e-8 if subject.outputs.dtype == torch.float64 else 1e-3
    for v in directions(subject, 2):
        slopes = [float((up - down).norm()) / (2 * h) for h, up, down in _both_sides(subject, v, first_derivative=True)]
        if min(slopes) > little * size:
            return False
    return True


def _both_sides(subject: Subject, v: Tensor, first_derivative: bool) -> Iterator[tuple[float, Tensor, Tensor]]:
    """h, and the loss (or its gradient) at ``y + h v`` and ``y - h v``, for every h where both are finite."""
    y = subject.outputs
    scale = min(max(float(y.double().square().mean().sqrt()), 1e-3), 1e3)
    reason, found = "it is NaN or infinite there", False
    for step in _STEPS.get(y.dtype, _STEPS[torch.float32]):
        h = scale * step
        try:
            up, down = (_at(subject, y + sign * h * v, first_derivative) for sign in (1, -1))
        except Exception as error:
            reason, _ = in_plain_words(error)
            continue
        if bool(torch.isfinite(up).all() & torch.isfinite(down).all()):
            found = True
            yield h, up, down
    if not found:
        raise CannotMove(f"the loss cannot be evaluated around these outputs: {reason}")


def _at(subject: Subject, outputs: Tensor, first_derivative: bool) -> Tensor:
    return subject.gradient(outputs) if first_derivative else subject.total(outputs).detach()
