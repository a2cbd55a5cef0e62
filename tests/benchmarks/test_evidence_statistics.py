"""The statistics of the evidence against scipy and closed forms."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
from benchmarks.evidence.tables.paired import bootstrap_interval, compare, holm, sign_flip_p, wilcoxon_p

DIFFERENCES = np.random.default_rng(3).normal(0.6, 1.0, 9)


def test_sign_flips_are_scipys_exact_permutation_test() -> None:
    def mean(x: np.ndarray, axis: int) -> np.ndarray:
        return x.mean(axis)

    for d in (DIFFERENCES, -DIFFERENCES, DIFFERENCES[:5]):
        exact = scipy.stats.permutation_test((d,), mean, permutation_type="samples", n_resamples=np.inf)
        assert sign_flip_p(d) == pytest.approx(exact.pvalue)


@pytest.mark.parametrize("n", [1, 4, 10, 16])
def test_differences_of_one_sign_have_the_smallest_p(n: int) -> None:
    assert sign_flip_p(np.linspace(0.5, 2.0, n)) == 2 / 2**n


def test_ties_and_zeros_are_counted_whole() -> None:
    d = [0.1, 0.2, -0.3, 0.0, 0.3]
    observed = abs(sum(d))
    sums = [sum(s * v for s, v in zip(signs, d, strict=True)) for signs in itertools.product((1, -1), repeat=5)]
    assert sign_flip_p(d) == np.mean([abs(s) >= observed - 1e-12 for s in sums])
    assert sign_flip_p([0.0, 0.0]) == 1.0


def test_too_many_signs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"n <= 20; got 21 differences"):
        sign_flip_p(np.ones(21))


def test_the_bootstrap_interval_is_scipys() -> None:
    low, high = bootstrap_interval(DIFFERENCES)
    theirs = scipy.stats.bootstrap((DIFFERENCES,), np.mean, n_resamples=10_000, method="percentile", rng=1)
    spread = DIFFERENCES.std()
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.03 * spread)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.03 * spread)


def test_the_bootstrap_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = [low <= 1.0 <= high for low, high in (bootstrap_interval(rng.normal(1.0, 2.0, 16)) for _ in range(150))]
    assert 0.85 <= np.mean(hits) <= 0.99  # percentile intervals of 16 are a little short


def test_wilcoxon() -> None:
    assert wilcoxon_p(DIFFERENCES) == pytest.approx(scipy.stats.wilcoxon(DIFFERENCES, mode="exact").pvalue)
    assert wilcoxon_p([0.0, 0.0, 0.0]) == 1.0


def test_holm_by_its_definition() -> None:
    ps = [0.011, 0.02, 0.005, 0.6, 0.04]
    for alpha in np.linspace(0.001, 0.999, 400):
        rejected, order = set(), sorted(range(5), key=lambda i: ps[i])
        for k, i in enumerate(order):  # step down until the first that is not small enough
            if ps[i] > alpha / (5 - k):
                break
            rejected.add(i)
        assert rejected == {i for i, p in enumerate(holm(ps)) if p <= alpha}


def test_holm_keeps_the_error_of_the_family() -> None:
    rng = np.random.default_rng(1)
    false = [min(holm(rng.uniform(size=12))) < 0.05 for _ in range(2000)]
    assert np.mean(false) < 0.065


def test_a_comparison_is_paired() -> None:
    base = np.array([10.0, 50.0, 90.0, 30.0, 70.0])
    c = compare(np.add(base, [1.0, 2.0, 1.0, 2.0, 1.5]), base)
    assert c.mean == pytest.approx(1.5)
    assert 1.0 <= c.low < c.mean < c.high <= 2.0
    assert c.p == 2 / 32
    assert c.pairs == 5
