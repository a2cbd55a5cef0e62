"""Soft comparators: how much of b goes to the smaller output of a comparator of (a, b).

A comparator puts min(a, b) on one wire and max(a, b) on the other. Softened, with x = steepness * (b - a)::

    smaller = f(x) a + f(-x) b        larger = f(-x) a + f(x) b

where f is a distribution function with f(x) + f(-x) = 1.
Which f matters: the logistic and the Gaussian saturate, so a wrong order far away gives vanishing gradients
and outputs that are not monotone in the inputs; the Cauchy and the reciprocal have heavy tails; the "optimal"
one is the monotone one of least error.

============  =======================================================  ==========================
swap          f(x)                                                     the tail f(-y), y >= 0
============  =======================================================  ==========================
logistic      1 / (1 + exp(-x))                                        exp(-y) / (1 + exp(-y))
cauchy        1/2 + atan(x) / pi                                       atan(1 / y) / pi
gaussian      Phi(x)                                                   erfc(y / sqrt 2) / 2
reciprocal    (1 + x / (2 + abs(x))) / 2                               1 / (2 + y)
optimal       1/2 + x within +-1/4, else 1 - 1/(16x) or -1/(16x)       1 / (16 y) beyond 1/4
============  =======================================================  ==========================

Sources: Petersen et al., "Differentiable sorting networks for scalable sorting and ranking supervision", ICML
2021 (logistic); "Monotonic differentiable sorting networks", ICLR 2022, section 4 (reciprocal, Cauchy,
optimal).

**Logarithms.** ``log f(x)`` is ``log`` of the tail for x < 0 and ``log1p(-tail)`` for x >= 0. No tail is
computed as one minus something; where it would underflow (logistic, Gaussian) its logarithm has a formula of
its own. The Gaussian's grows with the square: at steepness * distance = 1e7 it is 5e13, where float64 numbers
are 0.008 apart, so there its derivatives keep two digits only (up to 1e6 all that float32 has).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SWAPS", "log_swap", "swap"]


def _optimal(x: Tensor) -> Tensor:
    inside = x.abs() <= 0.25
    far = 1 / (16 * torch.where(inside, 1.0, x))
    return torch.where(inside, 0.5 + x, torch.where(x > 0, 1.0, 0.0) - far)


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": torch.sigmoid,
    "cauchy": lambda x: torch.atan2(torch.ones_like(x), -x) / math.pi,
    "gaussian": lambda x: 0.5 * torch.special.erfc(x * -math.sqrt(0.5)),
    "reciprocal": lambda x: 0.5 * (1 + x / (2 + x.abs())),
    "optimal": _optimal,
}


def _optimal_tail(y: Tensor) -> Tensor:
    inside = y <= 0.25
    return torch.where(inside, 0.5 - y, 1 / (16 * torch.where(inside, 1.0, y)))


def _reciprocal_tail(y: Tensor) -> Tensor:
    # The same number twice. f'' jumps at 0, and with abs its value there is 0, the mean of both sides.
    return torch.where(y <= 1, 0.5 * (1 - y / (2 + y.abs())), 1 / (2 + y))


# y >= 0 -> (tail, log of the tail)
_TAILS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "logistic": lambda y: (torch.sigmoid(-y), -y - torch.log1p(torch.exp(-y))),
    "cauchy": lambda y: _and_log(torch.atan2(torch.ones_like(y), y) / math.pi),
    "gaussian": lambda y: (
        0.5 * torch.special.erfc(y * math.sqrt(0.5)),
        torch.log(0.5 * torch.special.erfcx(y * math.sqrt(0.5))) - 0.5 * y * y,
    ),
    "reciprocal": lambda y: _and_log(_reciprocal_tail(y)),
    "optimal": lambda y: _and_log(_optimal_tail(y)),
}

SWAPS = tuple(_FUNCTIONS)


def _and_log(tail: Tensor) -> tuple[Tensor, Tensor]:
    return tail, torch.log(tail)


def swap(name: str, x: Tensor) -> Tensor:
    """f(x), in the dtype of x.

    >>> swap("cauchy", torch.tensor([-1.0, 0.0, 1.0])).tolist()
    [0.25, 0.5, 0.75]
    """
    return _FUNCTIONS[name](x)


def log_swap(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """``(log f(x), log f(-x))``, both with full relative accuracy.

    >>> log_swap("logistic", torch.tensor(-1000.0))
    (tensor(-1000.), tensor(-0.))
    """
    # The branch x >= 0 also carries the derivative at 0; abs would have slope 0 there.
    positive = x >= 0
    tail, log_tail = _TAILS[name](torch.where(positive, x, -x))
    log_rest = torch.log1p(-tail)
    return torch.where(positive, log_rest, log_tail), torch.where(positive, log_tail, log_rest)
