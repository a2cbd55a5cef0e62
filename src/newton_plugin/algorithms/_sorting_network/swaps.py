"""Soft comparators: how much of b goes to the smaller output of a comparator of (a, b).

A comparator puts min(a, b) on one wire and max(a, b) on the other. Softened, with x = steepness * (b - a)::

    smaller = f(x) a + f(-x) b        larger = f(-x) a + f(x) b

where f is a distribution function with f(x) + f(-x) = 1. The choice of f matters: the logistic and the Gaussian
saturate, so for two values far apart in the wrong order gradients vanish, and outputs are not monotone in the
inputs. The Cauchy and the reciprocal have heavy tails. The "optimal" one is the monotone f of least error.

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
computed as one minus something. Where it would underflow (logistic, Gaussian) its logarithm has a formula of
its own: for the Gaussian far away the asymptotic series of Mills' ratio, whose derivatives keep all their digits.
One limit remains: the Gaussian's logarithm grows with the square. At steepness * distance = 1e7 it is 5e13, where
float64 numbers are 0.008 apart; the difference of two paths through the network is rounded to that. There gradients
and Hessians are good to 1e-3 relative (measured 1.7e-4), not to 1e-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SWAPS", "log_swap", "log_swap_slopes", "swap", "swap_slope"]


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


def _optimal_density(x: Tensor) -> Tensor:
    inside = x.abs() <= 0.25
    far = torch.where(inside, 1.0, x)
    return torch.where(inside, 1.0, 1 / (16 * far * far))


_DENSITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": lambda x: torch.sigmoid(x) * torch.sigmoid(-x),
    "cauchy": lambda x: 1 / (math.pi * (1 + x * x)),
    "gaussian": lambda x: torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi),
    "reciprocal": lambda x: (2 + x.abs()).square().reciprocal(),
    "optimal": _optimal_density,
}


def _optimal_tail(y: Tensor) -> Tensor:
    inside = y <= 0.25
    return torch.where(inside, 0.5 - y, 1 / (16 * torch.where(inside, 1.0, y)))


def _reciprocal_tail(y: Tensor) -> Tensor:
    # Both formulas give the same number. f'' jumps at 0; through abs its value there is 0, the mean of both sides.
    return torch.where(y <= 1, 0.5 * (1 - y / (2 + y.abs())), 1 / (2 + y))


_FAR = 40.0  # from here on the series below is exact in float64


def _log_gaussian_tail(y: Tensor) -> Tensor:
    """``log Phi(-y) = -y^2/2 - log(sqrt(2 pi) y) - t + 5/2 t^2 - 37/3 t^3 + 353/4 t^4 - ...``, t = 1/y^2, for large y.

    This is the logarithm of the asymptotic series of Mills' ratio. For smaller y, erfcx; for large y the derivatives
    of log(erfcx) would be differences of numbers of the size of y and y^2.
    """
    far = y > _FAR
    near = torch.where(far, 1.0, y)
    y = torch.where(far, y, _FAR)
    t = 1 / (y * y)
    series = -t * (1 - t * (5 / 2 - t * (37 / 3 - t * 353 / 4))) - torch.log(y * math.sqrt(2 * math.pi))
    return torch.where(
        far, series - 0.5 * y * y, torch.log(0.5 * torch.special.erfcx(near * math.sqrt(0.5))) - 0.5 * near * near
    )


# y >= 0 -> (tail, log of the tail)
_TAILS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "logistic": lambda y: (torch.sigmoid(-y), -y - torch.log1p(torch.exp(-y))),
    "cauchy": lambda y: _and_log(torch.atan2(torch.ones_like(y), y) / math.pi),
    "gaussian": lambda y: (0.5 * torch.special.erfc(y * math.sqrt(0.5)), _log_gaussian_tail(y)),
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


def swap_slope(name: str, x: Tensor) -> Tensor:
    """f'(x), in the dtype of x.

    >>> swap_slope("reciprocal", torch.tensor([-2.0, 0.0])).tolist()
    [0.0625, 0.25]
    """
    return _DENSITIES[name](x)


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


def log_swap_slopes(name: str, x: Tensor, log_f: Tensor, log_rest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First and second derivatives in x of log f(x), and of log f(-x): ``(v', v'', q', q'')``.

    ``log_f, log_rest`` are what :func:`log_swap` gave.

    >>> x = torch.zeros(())
    >>> [d.item() for d in log_swap_slopes("logistic", x, *log_swap("logistic", x))]
    [0.5, -0.25, -0.5, -0.25]
    """
    v1, v2 = _SLOPES[name](x, log_f, log_rest)
    q1, q2 = _SLOPES[name](-x, log_rest, log_f)
    return v1, v2, -q1, q2


def _logistic_slopes(x: Tensor, log_f: Tensor, log_rest: Tensor) -> tuple[Tensor, Tensor]:
    rest = log_rest.exp()
    return rest, -rest * log_f.exp()


def _cauchy_slopes(x: Tensor, log_f: Tensor, log_rest: Tensor) -> tuple[Tensor, Tensor]:
    slope = swap_slope("cauchy", x) / log_f.exp()
    return slope, -slope * (2 * x / (1 + x * x) + slope)


def _gaussian_slopes(x: Tensor, log_f: Tensor, log_rest: Tensor) -> tuple[Tensor, Tensor]:
    # Far in the tail, the series of _log_gaussian_tail, differentiated.
    y = torch.where(x < -_FAR, -x, _FAR)
    t = 1 / (y * y)
    far1 = y + (1 - t * (2 - t * (10 - t * (74 - t * 706)))) / y
    far2 = t * (1 - t * (6 - t * (50 - t * (518 - t * 6354)))) - 1
    near = torch.exp(-0.5 * x * x - log_f) / math.sqrt(2 * math.pi)
    return torch.where(x < -_FAR, far1, near), torch.where(x < -_FAR, far2, -near * (x + near))


def _reciprocal_slopes(x: Tensor, log_f: Tensor, log_rest: Tensor) -> tuple[Tensor, Tensor]:
    tail = 1 / (2 + x.abs())
    slope = tail * tail / log_f.exp()
    return slope, -slope * (2 * x.sign() * tail + slope)


def _optimal_slopes(x: Tensor, log_f: Tensor, log_rest: Tensor) -> tuple[Tensor, Tensor]:
    slope = _optimal_density(x) / log_f.exp()
    inside = x.abs() <= 0.25
    return slope, -slope * (torch.where(inside, 0.0, 2 / torch.where(inside, 1.0, x)) + slope)


_SLOPES: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "logistic": _logistic_slopes,
    "cauchy": _cauchy_slopes,
    "gaussian": _gaussian_slopes,
    "reciprocal": _reciprocal_slopes,
    "optimal": _optimal_slopes,
}
