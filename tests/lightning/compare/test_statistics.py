"""The exchange test: against written-out enumeration, and at its promised rate where there is nothing to find."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from newton_plugin_lightning._compare import statistics
from newton_plugin_lightning._compare.statistics import Scores, difference, holm, seeds_needed, smallest_p


def scores(values: Tensor) -> Scores:
    return Scores(values.double(), torch.zeros(values.shape))


def drawn(seed: int, seeds: int, rates: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, seeds, rates, generator=generator, dtype=torch.float64))  # pyright: ignore


def best_gap(ours: Tensor, theirs: Tensor) -> float:
    return float(ours.mean(0).max() - theirs.mean(0).max())


def all_gaps(ours: Tensor, theirs: Tensor) -> list[float]:
    """The statistic for every way to exchange seeds, one after the other."""
    gaps = []
    for pattern in itertools.product([False, True], repeat=len(ours)):
        swap = torch.tensor(pattern)[:, None]
        gaps.append(best_gap(torch.where(swap, theirs, ours), torch.where(swap, ours, theirs)))
    return gaps


@pytest.mark.parametrize("rates", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_p_is_the_share_of_exchanges_as_far_out(seed: int, rates: int) -> None:
    ours, theirs = drawn(seed, 6, rates)
    gaps = all_gaps(ours, theirs)
    share = sum(abs(gap) >= abs(gaps[0]) - 1e-12 for gap in gaps) / len(gaps)
    found = difference(scores(ours), scores(theirs))
    assert found.p == pytest.approx(share)
    assert found.mean == pytest.approx(best_gap(ours, theirs))


@pytest.mark.parametrize("rates", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_interval_holds_the_shifts_that_are_not_rejected(seed: int, rates: int) -> None:
    ours, theirs = drawn(seed, 7, rates)
    found = difference(scores(ours), scores(theirs))
    for end, inward in ((found.low, 1), (found.high, -1)):
        for step, rejected in ((inward * 1e-6, False), (-inward * 1e-6, True)):
            gaps = all_gaps(ours - end - step, theirs)
            above = sum(gap >= gaps[0] - 1e-12 for gap in gaps) / len(gaps)
            below = sum(gap <= gaps[0] + 1e-12 for gap in gaps) / len(gaps)
            assert (2 * min(above, below) <= statistics.LEVEL) == rejected


def test_six_differences_at_one_rate() -> None:
    d = torch.tensor([1.0, 2, 3, 4, 5, 6])[:, None]
    found = difference(scores(d), scores(torch.zeros(6, 1)))
    assert (found.mean, found.p) == (3.5, 2 / 64)
    assert (found.low, found.high) == pytest.approx(
        (1, 6)
    )  # of 64 subsets' means the outermost on each side are cut off


def test_five_seeds_bound_nothing() -> None:
    found = difference(scores(torch.ones(5, 1)), scores(torch.zeros(5, 1)))
    assert (found.low, found.high, found.p) == (-math.inf, math.inf, 2 / 32)


@given(st.integers(0, 10**6), st.floats(-3, 3), st.floats(0.1, 10))
def test_shifts_and_units(seed: int, shift: float, unit: float) -> None:
    ours, theirs = drawn(seed, 6, 2)
    one = difference(scores(ours), scores(theirs))
    moved = difference(scores(unit * (ours + shift)), scores(unit * (theirs + shift)))
    turned = difference(scores(theirs), scores(ours))
    assert moved.p == one.p == turned.p
    assert (moved.mean, moved.low, moved.high) == pytest.approx((unit * one.mean, unit * one.low, unit * one.high))
    assert (turned.mean, turned.low, turned.high) == pytest.approx((-one.mean, -one.high, -one.low))


def test_a_rate_with_a_failed_run_is_not_chosen_while_another_has_none() -> None:
    ours, theirs = torch.tensor([[5.0, 1.0]] * 6), torch.zeros(6, 2)
    failed = torch.zeros(6, 2)
    failed[0, 0] = 1
    assert difference(Scores(ours.double(), failed), scores(theirs)).mean == 1.0
    assert difference(scores(ours), scores(theirs)).mean == 5.0


def test_many_seeds_are_exchanged_at_random_and_p_keeps_its_least_value() -> None:
    found = difference(scores(torch.ones(40, 1)), scores(torch.zeros(40, 1)))
    assert found.p == 2 / 2**16
    ours, theirs = drawn(0, 40, 1)
    d = (ours - theirs)[:, 0]
    t = d.mean() / (d.std() / 40**0.5)
    normal = 1 + math.erf(-abs(float(t)) / 2**0.5)
    assert difference(scores(ours), scores(theirs)).p == pytest.approx(normal, abs=0.02)


def test_holm_by_hand() -> None:
    assert holm([0.02, 0.01, 0.5]) == pytest.approx([0.04, 0.03, 0.5])
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])
    assert holm([]) == []


@pytest.mark.parametrize("comparisons", range(1, 8))
def test_seeds_needed(comparisons: int) -> None:
    needed = seeds_needed(comparisons)
    assert smallest_p(needed, comparisons) <= 0.05 < smallest_p(needed - 1, comparisons)


# Where nothing is to be found: both arms depend on the rate and on the seed alike.


Noise = Callable[[Tensor], Tensor]
NOISES: dict[str, Noise] = {
    "normal": lambda z: z,
    "heavy tails": lambda z: z**3,
    "skewed": torch.exp,
    "by rate": lambda z: z * (1 + torch.arange(z.shape[-1])),
}


def null_problem(generator: torch.Generator, noise: Noise) -> tuple[Tensor, Tensor]:
    """Eight seeds, three rates: effects of rate and seed that both arms share, and noise of their own."""
    shared = torch.randn(3, generator=generator) * 0.3 + torch.randn(8, 1, generator=generator)
    ours, theirs = noise(torch.randn(2, 8, 3, generator=generator))
    return shared + ours, shared + theirs


@pytest.mark.parametrize("noise", NOISES.values(), ids=NOISES.keys())
def test_the_promised_rate_is_kept_though_rates_are_chosen(noise: Noise) -> None:
    generator = torch.Generator().manual_seed(0)
    found = sum(difference(*map(scores, null_problem(generator, noise))).p <= 0.05 for _ in range(1500))
    expected = 1500 * 12 / 256  # the largest p below .05 that there is
    assert abs(found - expected) <= 3 * expected**0.5


def test_the_best_rate_against_one_rate_would_not_keep_it() -> None:
    generator = torch.Generator().manual_seed(1)
    found = 0
    for _ in range(500):
        ours, theirs = torch.randn(2, 8, 9, generator=generator)
        best = int(ours.mean(0).argmax())
        found += difference(scores(ours[:, best : best + 1]), scores(theirs[:, 4:5])).p <= 0.05
    assert found > 2 * 500 * 12 / 256


def test_a_true_difference_is_found() -> None:
    generator = torch.Generator().manual_seed(2)
    found = 0
    for _ in range(50):
        ours, theirs = null_problem(generator, NOISES["by rate"])
        found += difference(scores(ours + 5), scores(theirs)).p <= 0.05
    assert found > 35
