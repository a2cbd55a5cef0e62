"""soft_sort: the formula of the paper, its limit and its symmetries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from newton_plugin import _errors as errors
from newton_plugin.algorithms import soft_sort

lists = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=7)
quick = settings(deadline=None, derandomize=True, max_examples=40)
every_p = pytest.mark.parametrize("p", [1, 2])


@every_p
def test_the_formula(p: int) -> None:
    scores = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = [torch.softmax(-((t - scores).abs() ** p) / 0.4, -1) for t in sorted(scores.tolist())]
    torch.testing.assert_close(soft_sort(scores, 0.4, p), torch.stack(rows), rtol=1e-12, atol=1e-15)


@every_p
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_towards_zero_temperature_it_is_torch_sort_exactly(p: int, dtype: torch.dtype) -> None:
    scores = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=dtype)
    sorted_ = (soft_sort(scores, 1e-9, p) @ scores.unsqueeze(-1)).squeeze(-1)
    assert torch.equal(sorted_, scores.sort(-1).values)


@quick
@given(lists, st.floats(0.01, 10), st.sampled_from([1, 2]))
def test_rows_are_probabilities_and_a_shift_changes_nothing(values, temperature, p) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    matrix = soft_sort(scores, temperature, p)
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(-1), torch.ones_like(scores))
    torch.testing.assert_close(soft_sort(scores + 1024.0, temperature, p), matrix, rtol=1e-5, atol=1e-8)


@quick
@given(lists, st.randoms(use_true_random=False), st.sampled_from([1, 2]))
def test_permuting_the_list_permutes_the_columns(values, random, p) -> None:
    scores = torch.tensor([round(v / 50) for v in values], dtype=torch.float64)
    order = list(range(len(values)))
    random.shuffle(order)
    torch.testing.assert_close(soft_sort(scores[order], 1.0, p), soft_sort(scores, 1.0, p)[:, order])


@every_p
def test_float32_scores_of_any_size_give_finite_p_and_gradients(p: int) -> None:
    scores = torch.tensor([3e38, -3e38, 0.0, 1e-38])
    matrix = soft_sort(scores, 0.1, p)
    assert matrix.isfinite().all()
    torch.testing.assert_close(matrix[[0, 3]], torch.eye(4)[[1, 0]])
    assert torch.func.grad(lambda s: soft_sort(s, 0.1, p)[0, 0])(scores).isfinite().all()


def test_what_it_refuses() -> None:
    scores = torch.zeros(3)
    with pytest.raises(errors.ArgumentError, match=r"p must be one of 1, 2; got 3\. It is the power"):
        soft_sort(scores, 1.0, 3)
    with pytest.raises(errors.ArgumentError, match=r"temperature must be positive and finite; got 0"):
        soft_sort(scores, 0.0)
    with pytest.raises(errors.ShapeError, match=r"scores must have shape \(\.\.\., n\)"):
        soft_sort(torch.tensor(1.0), 1.0)
