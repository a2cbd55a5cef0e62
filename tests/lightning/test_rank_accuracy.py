"""RankAccuracy against the definition, element by element."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import newton_plugin as npl
from newton_plugin_lightning import RankAccuracy, _rank_accuracy


def twin(scores: Tensor, ranks: Tensor) -> tuple[float, float]:
    """Full and element-wise, by counting: an element is right if its rank counts the smaller ones and none is equal."""
    lists = []
    for s, r in zip(scores.tolist(), ranks.tolist(), strict=True):
        lists.append([sum(a < b for a in s) == k and sum(a == b for a in s) == 1 for b, k in zip(s, r, strict=True)])
    flat = [x for row in lists for x in row]
    return sum(map(all, lists)) / len(lists), sum(flat) / len(flat)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(n=st.integers(1, 5), count=st.integers(1, 6), seed=st.integers(0, 10**6), levels=st.sampled_from([2, 5, 1000]))
def test_equals_the_definition(n: int, count: int, seed: int, levels: int) -> None:
    """With ties (few levels) and without; over several updates; any float dtype."""
    generator = torch.Generator().manual_seed(seed)
    metrics = [RankAccuracy(mode) for mode in ("full", "elements")]
    batches = []
    for dtype in (torch.float32, torch.float64):
        scores = torch.randint(0, levels, (count, n), generator=generator).to(dtype)
        ranks = torch.rand(count, n, generator=generator).argsort(-1)
        batches.append((scores.double(), ranks))
        for metric in metrics:
            metric.update(scores, ranks)
    expected = twin(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    assert [m.compute().item() for m in metrics] == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["full", "elements"])
def test_perfect_constant_reversed_and_nan(mode: Any) -> None:
    ranks = torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(k)) for k in range(20)])
    assert RankAccuracy(mode)(ranks * 0.1 - 7, ranks) == 1
    assert RankAccuracy(mode)(torch.zeros(20, 5), ranks) == 0
    assert RankAccuracy(mode)(torch.full((20, 5), torch.nan), ranks) == 0
    assert RankAccuracy(mode)(-ranks * 0.1, ranks) == pytest.approx(0 if mode == "full" else 1 / 5)
    one_nan = (ranks * 0.1).masked_fill(ranks == 4, torch.nan)
    assert RankAccuracy(mode)(one_nan, ranks) == pytest.approx(0 if mode == "full" else 4 / 5)


def test_states_add_up_over_processes() -> None:
    """Reduced by sum, two processes equal one on everything; resetting forgets."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(12, 3, generator=generator)
    ranks = torch.rand(12, 3, generator=generator).argsort(-1)
    parts, whole = [RankAccuracy("elements") for _ in range(2)], RankAccuracy("elements")
    for k, part in enumerate(parts):
        part.update(scores[5 * k : 5 + 7 * k], ranks[5 * k : 5 + 7 * k])
    whole.update(scores, ranks)
    assert all(reduce is not None for reduce in whole._reductions.values())
    merged = sum(p.right for p in parts) / sum(p.total for p in parts)
    assert torch.equal(merged, whole.compute())
    whole.reset()
    assert whole(ranks.float(), ranks) == 1


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metric = RankAccuracy()
    ranks = torch.tensor([[0, 1, 2]])
    metric.update(ranks.float(), ranks)
    for values in (None, [metric.compute(), torch.tensor(0.2)]):
        figure, axes = metric.plot(values)
        low, high = axes.get_ylim()
        assert low <= 0
        assert high >= 1
        plt.close(figure)


WRONG: list[tuple[Any, Any, type[Exception], str]] = [
    (torch.zeros(3), torch.zeros(3, dtype=torch.long), npl.ShapeError, r"must both be \(N, n\).*got \(3,\) and \(3,\)"),
    (torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.long), npl.ShapeError, r"got \(2, 3\) and \(2, 4\)"),
    (torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long), npl.ShapeError, "not empty"),
    (torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), npl.ArgumentTypeError, r"scores must be floating.*int64"),
    (torch.zeros(2, 3), torch.zeros(2, 3), npl.ArgumentTypeError, r"ranks must be integers; got torch\.float32"),
    ([[0.0]], torch.zeros(1, 1).long(), npl.ArgumentTypeError, r"scores must be a torch\.Tensor; got list"),
    (torch.zeros(1, 3), torch.tensor([[1, 2, 3]]), npl.ArgumentError, r"permutation of 0\.\.2.*from 1 to 3.*argsort"),
    (torch.zeros(1, 3), torch.tensor([[0, 2, 2]]), npl.ArgumentError, r"from 0 to 2, or repeated"),
]


@pytest.mark.parametrize(("scores", "ranks", "error", "message"), WRONG)
def test_wrong_inputs(scores: Any, ranks: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RankAccuracy().update(scores, ranks)


def test_wrong_mode_and_unchecked_ranks() -> None:
    with pytest.raises(npl.ArgumentError, match=r"mode must be 'full' or 'elements'; got 'half'"):
        RankAccuracy("half")  # type: ignore[arg-type]
    unchecked = RankAccuracy(validate_args=False)
    assert unchecked(torch.zeros(1, 3), torch.tensor([[1, 2, 3]])) == 0


def test_docstring_examples() -> None:
    assert doctest.testmod(_rank_accuracy).failed == 0
    assert doctest.testmod(_rank_accuracy).attempted >= 3
