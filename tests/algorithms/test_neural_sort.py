"""neural_sort: the formula of the paper, its limit and its symmetries."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from newton_plugin import _errors as errors
from newton_plugin.algorithms import neural_sort
from newton_plugin.algorithms._sorting.neural_sort import _distance_by_pairs, _distance_by_sums

lists = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=7)
quick = settings(deadline=None, derandomize=True, max_examples=40)


def _descending_as_in_the_paper(scores: Tensor, temperature: float) -> Tensor:
    n = len(scores)
    spread = (scores[:, None] - scores[None, :]).abs() @ torch.ones(n, dtype=scores.dtype)
    rows = [torch.softmax(((n + 1 - 2 * i) * scores - spread) / temperature, -1) for i in range(1, n + 1)]
    return torch.stack(rows)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 40])
def test_the_paper_read_from_the_other_end(n: int) -> None:
    scores = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    expected = _descending_as_in_the_paper(scores, 0.3).flip(0)
    torch.testing.assert_close(neural_sort(scores, 0.3), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_towards_zero_temperature_it_is_torch_sort_exactly(dtype: torch.dtype) -> None:
    scores = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=dtype)
    p = neural_sort(scores, 1e-9)
    assert torch.equal((p @ scores.unsqueeze(-1)).squeeze(-1), scores.sort(-1).values)


@quick
@given(lists, st.floats(0.01, 10))
def test_rows_are_probabilities_and_a_shift_changes_nothing(values: list[float], temperature: float) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    p = neural_sort(scores, temperature)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones_like(scores))
    torch.testing.assert_close(neural_sort(scores + 1024.0, temperature), p, rtol=1e-6, atol=1e-9)


@quick
@given(lists, st.randoms(use_true_random=False))
def test_permuting_the_list_permutes_the_columns_and_the_gradient(values: list[float], random) -> None:
    # Few distinct values, so that ties occur: they too must not depend on the place in memory.
    scores = torch.tensor([round(v / 50) for v in values], dtype=torch.float64)
    order = list(range(len(values)))
    random.shuffle(order)
    weight = torch.linspace(-1, 1, len(values), dtype=torch.float64)

    def spread(s: Tensor) -> Tensor:
        return (weight * (neural_sort(s, 1.0) @ s) ** 2).sum()

    torch.testing.assert_close(neural_sort(scores[order], 1.0), neural_sort(scores, 1.0)[:, order])
    torch.testing.assert_close(
        torch.func.grad(spread)(scores[order]), torch.func.grad(spread)(scores)[order], rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("values", [7, 1, 1000])
@pytest.mark.parametrize("n", [1, 2, 5, 33])
def test_distances_by_sums_are_those_by_pairs_at_ties_too(n: int, values: int) -> None:
    generator = torch.Generator().manual_seed(n)
    scores = torch.randint(0, values, (4, n), generator=generator).double()
    weight = torch.randn(4, n, generator=generator, dtype=torch.float64)
    ways: list[Callable[[Tensor], Tensor]] = [_distance_by_pairs, lambda s: _distance_by_sums(*s.sort(-1))]
    by_pairs, by_sums = (
        (f(scores), torch.func.grad(lambda s, f=f: (weight * f(s)).sum())(scores), torch.func.vmap(f)(scores))
        for f in ways
    )
    torch.testing.assert_close(by_sums, by_pairs, rtol=1e-13, atol=1e-13)


def test_a_large_batch_is_its_lists_one_by_one() -> None:
    """Long batches take another route to the same logits."""
    scores = torch.randn(130, 33, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    weight = torch.linspace(-1, 1, 33)

    def spread(s: Tensor) -> Tensor:
        return (neural_sort(s, 0.1) @ weight).square().sum()

    assert scores.numel() * 33 > 2**17
    torch.testing.assert_close(neural_sort(scores, 0.1), torch.stack([neural_sort(s, 0.1) for s in scores]))
    few = scores[:5]
    together = torch.func.grad(spread)(scores)[:5]
    torch.testing.assert_close(together, torch.stack([torch.func.grad(spread)(s) for s in few]), rtol=1e-5, atol=1e-5)


def test_what_it_refuses() -> None:
    scores = torch.zeros(3)
    with pytest.raises(errors.ArgumentError, match=r"temperature must be positive and finite; got -1"):
        neural_sort(scores, -1.0)
    with pytest.raises(errors.ArgumentTypeError, match=r"temperature must be a positive number; got '1'"):
        neural_sort(scores, "1")  # type: ignore[arg-type]
    with pytest.raises(errors.ArgumentTypeError, match=r"scores must have a floating-point dtype"):
        neural_sort(scores.long(), 1.0)
    with pytest.raises(errors.ShapeError, match=r"scores must have shape \(\.\.\., n\) with n >= 1; got \(\)"):
        neural_sort(torch.tensor(1.0), 1.0)
