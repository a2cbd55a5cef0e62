"""Paired comparisons: an interval, two p-values, and Holm's correction for many of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import wilcoxon

__all__ = ["Comparison", "bootstrap_interval", "compare", "holm", "sign_flip_p", "wilcoxon_p"]

_RESAMPLES = 10_000
_EXACT = 20  # differences whose 2^n signs are all looked at


@dataclass(frozen=True)
class Comparison:
    """What is known of the mean of paired differences.

    Attributes:
        mean: of the differences.
        low, high: bootstrap interval, 95 %.
        p: exact sign-flip permutation test, two-sided.
        wilcoxon: signed-rank test, two-sided.
        pairs: how many.
    """

    mean: float
    low: float
    high: float
    p: float
    wilcoxon: float
    pairs: int


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Ours minus theirs, pair by pair."""
    differences = np.asarray(ours, float) - np.asarray(theirs, float)
    low, high = bootstrap_interval(differences)
    return Comparison(
        float(differences.mean()), low, high, sign_flip_p(differences), wilcoxon_p(differences), len(differences)
    )


def bootstrap_interval(differences: Sequence[float] | np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean, from 10,000 resamples of the differences; the same at every call.

    >>> bootstrap_interval([1.0, 1.0, 1.0])
    (1.0, 1.0)
    """
    d = np.asarray(differences, float)
    index = np.random.default_rng(0).integers(len(d), size=(_RESAMPLES, len(d)))
    low, high = np.quantile(d[index].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def sign_flip_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided p of the mean, if each difference is as likely to have the other sign.

    All 2^n signs are looked at, so for differences of one sign p is 2 / 2^n:

    >>> sign_flip_p([1.0, 2.0, 3.0])
    0.25

    Raises:
        ValueError: more than 20 differences.
    """
    d = np.asarray(differences, float)
    if len(d) > _EXACT:
        raise ValueError(f"the exact test looks at 2^n signs, n <= {_EXACT}; got {len(d)} differences.")
    sums = np.zeros(1)
    for value in d:
        sums = np.concatenate([sums + value, sums - value])
    tolerance = 1e-9 * max(1.0, np.abs(d).sum())  # sums of the same numbers in another order
    return float((np.abs(sums) >= abs(d.sum()) - tolerance).mean())


def wilcoxon_p(differences: Sequence[float] | np.ndarray) -> float:
    """Two-sided signed-rank p; 1 where all differences are zero."""
    d = np.asarray(differences, float)
    if not d.any():
        return 1.0
    return float(wilcoxon(d).pvalue)  # pyright: ignore[reportAttributeAccessIssue]


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected so that the chance of one false discovery among all stays below alpha (Holm 1979).

    The k-th smallest of m is multiplied by m - k + 1; none becomes smaller than one before it.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(ps)), key=lambda i: ps[i])
    corrected, least = [1.0] * len(ps), 0.0
    for k, i in enumerate(order):
        least = max(least, min(1.0, (len(ps) - k) * ps[i]))
        corrected[i] = least
    return corrected
