"""Is one arm ahead of another, when the learning rate of both was chosen by looking at the same runs?

The best of three rates flatters an arm, and the best of three differences finds something in noise. So the choice is
made part of the test. Each seed gives two blocks of figures, ours at R rates and theirs at R rates. If the two arms are
alike, a seed's blocks may as well be exchanged. The statistic chooses the best rate of each side by its mean over the
seeds and takes the difference; it is computed again, *the choice included*, for every way to exchange blocks. The share
of these at least as far out as the true one is the p-value, exactly, whatever the figures' distribution. With one rate
this is the sign-flip test of paired differences.

The interval holds every shift delta that this test does not reject when delta is taken off ours. Let a way exchange a
share f of the seeds and let A - B be its difference without the shift. With the shift it is A - B - (1 - 2 f) delta,
and the true one is D - delta. So it is the larger from ``(D - (A - B)) / (2 f)`` on: the ends of the interval are order
statistics of these thresholds. With one rate they are the means of the differences over all subsets of the seeds.

Source: Fisher, The Design of Experiments (1935), section 21; Holm, A Simple Sequentially Rejective Multiple Test
Procedure (1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LEVEL", "Difference", "Scores", "difference", "holm", "seeds_needed", "smallest_p"]

LEVEL = 0.05
_EXACT = 16  # seeds whose 2^n exchanges are all looked at; beyond, as many at random


@dataclass(frozen=True)
class Scores:
    """An arm's figures, larger is better.

    Attributes:
        values: (S, R), seeds by rates; a failed run has the value that stands for it.
        failed: (S, R), whether a run failed.
    """

    values: Tensor
    failed: Tensor


@dataclass(frozen=True)
class Difference:
    """Ours at its best rate minus theirs at its best rate.

    Attributes:
        mean: of the paired differences.
        low, high: 95 % interval; infinite where there are too few seeds to bound it.
        p: of the exchange test, two-sided.
    """

    mean: float
    low: float
    high: float
    p: float


def difference(ours: Scores, theirs: Scores) -> Difference:
    """Compare two arms, each at the rate with the fewest failed runs and, among these, the best mean.

    Args:
        ours, theirs: of the same seeds and as many rates.

    >>> three = lambda *x: Scores(torch.tensor(x).double()[:, None], torch.zeros(3, 1))
    >>> difference(three(2.0, 3.0, 5.0), three(1.0, 1.0, 2.0)).p  # of one sign: 2 of 8 exchanges
    0.25
    """
    exchanged = _exchanges(len(ours.values))
    us, them = _best(ours, theirs, exchanged), _best(theirs, ours, exchanged)
    gaps = us - them
    found = gaps[0]
    slack = 1e-9 * max(1.0, float(torch.stack([ours.values.abs().max(), theirs.values.abs().max()]).max()))
    above, below = float((gaps >= found - slack).double().mean()), float((gaps <= found + slack).double().mean())
    low, high = _interval(found, gaps, exchanged.mean(1))
    return Difference(float(found), low, high, min(1.0, 2 * min(above, below)))


def _exchanges(seeds: int) -> Tensor:
    """(K, S) zeros and ones: which seeds' blocks are exchanged. The first row exchanges none."""
    if seeds <= _EXACT:
        return (torch.arange(2**seeds)[:, None] >> torch.arange(seeds) & 1).double()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(2, (2**_EXACT, seeds), generator=generator).double()
    drawn[0] = 0
    return drawn


def _best(ours: Scores, theirs: Scores, exchanged: Tensor) -> Tensor:
    """(K,): the mean of our side at its best rate, for each way to exchange."""
    seeds = len(ours.values)
    means = ((1 - exchanged) @ ours.values + exchanged @ theirs.values) / seeds
    failed = (1 - exchanged) @ ours.failed.double() + exchanged @ theirs.failed.double()
    allowed = failed == failed.amin(1, keepdim=True)
    return means.masked_fill(~allowed, -math.inf).amax(1)


def _interval(found: Tensor, gaps: Tensor, shares: Tensor) -> tuple[float, float]:
    k = math.floor(LEVEL / 2 * len(gaps))
    if k == 0:
        return -math.inf, math.inf
    moved = shares > 0
    thresholds = ((found - gaps[moved]) / (2 * shares[moved])).sort().values
    return float(thresholds[k - 1]), float(thresholds[-k])


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number: the k-th smallest of m times m - k + 1, and never below one before it.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    corrected, least = [1.0] * len(ps), 0.0
    for k, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        least = max(least, min(1.0, (len(ps) - k) * ps[i]))
        corrected[i] = least
    return corrected


def smallest_p(seeds: int, comparisons: int) -> float:
    """The smallest p, after Holm, that so many seeds and comparisons can give.

    >>> smallest_p(5, 2), smallest_p(8, 2)
    (0.125, 0.015625)
    """
    return min(1.0, comparisons * 2 / 2 ** min(seeds, _EXACT))


def seeds_needed(comparisons: int) -> int:
    """How many seeds can show a difference at the 5 % level after Holm.

    >>> seeds_needed(1), seeds_needed(2), seeds_needed(3)
    (6, 7, 7)
    """
    return next(n for n in range(1, _EXACT + 1) if smallest_p(n, comparisons) <= LEVEL or n == _EXACT)
