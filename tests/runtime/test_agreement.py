"""Whether ranks agree, from sums alone: against a comparison of the texts themselves."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from newton_plugin._runtime.agreement import CODES, Verdict, all_equal, codes_of, were_equal

CPU = torch.device("cpu")


def summed(texts: list[str], dtype: torch.dtype = torch.float64) -> Tensor:
    """What an all-reduce would give, added up one rank after the other in the dtype of the exchange."""
    return torch.stack([codes_of(text, dtype, CPU) for text in texts]).cumsum(0)[-1]


def test_only_equal_texts_agree() -> None:
    for texts in itertools.product(["ab", "c", ""], repeat=3):
        sums, expected = summed(list(texts)), len(set(texts)) == 1
        assert were_equal(sums.tolist(), 3) == expected
        assert bool(all_equal(sums, 3)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ranks", [2, 1000, 4096])
def test_one_rank_of_many_is_enough(dtype: torch.dtype, ranks: int) -> None:
    """Sums stay exact, also in float32."""
    for what in ("'output' with 10 features", "no boundary", "a" * 10_000):
        same = summed([what] * ranks, dtype)
        assert were_equal(same.tolist(), ranks)
        assert bool(all_equal(same, ranks))
        other = summed([what] * (ranks - 1) + [what + "!"], dtype)
        assert not were_equal(other.tolist(), ranks)
        assert not bool(all_equal(other, ranks))


def test_many_texts_have_many_codes() -> None:
    codes = {tuple(codes_of(str(k), torch.float64, CPU).tolist()) for k in range(2000)}
    assert len(codes) == 2000
    assert all(len(code) == CODES for code in codes)


def test_a_verdict_of_the_host_is_there_at_once() -> None:
    assert Verdict.of(torch.tensor(True), "").read()
    assert not Verdict.of(torch.tensor(False), "").read()
    assert Verdict.of(torch.tensor(True), "").copied is None
