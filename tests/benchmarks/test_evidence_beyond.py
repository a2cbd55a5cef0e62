"""The problems beyond the paper: what they draw, what they are judged by, and what their losses are."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from benchmarks.evidence.data.images import digit_images
from benchmarks.evidence.data.written_numbers import write_numbers
from benchmarks.evidence.problems.allocation import allocate, regret, utility
from benchmarks.evidence.problems.registry import problems
from benchmarks.evidence.problems.relevance import GRADES, ndcg
from benchmarks.evidence.problems.sequences import BLANK, CLASSES, greedy_decode
from benchmarks.evidence.training.arms import ARMS
from torch import Tensor, nn

from newton_plugin.algorithms import ndcg_loss

EVERY = {name: problem for name, problem in problems().items() if problem.table == "beyond"}


@pytest.mark.parametrize("name", EVERY)
def test_a_problem_keeps_its_contract(name: str) -> None:
    p = EVERY[name]
    assert p.without
    assert set(p.without) <= set(ARMS)
    (inputs, targets), again = next(p.batches([5, 6, 5], 4, 2)), next(p.batches([6], 4, 2))
    assert inputs.shape[:2] == targets.shape[:2] == (3, 4)
    for drawn, alone in zip((inputs, targets), again, strict=True):
        assert torch.equal(drawn[0], drawn[2])  # a seed's batches are its own, whoever else is there
        assert torch.equal(drawn[1:2], alone)
        assert not torch.equal(drawn[0], drawn[1])
    torch.manual_seed(0)
    outputs = p.network()(inputs.flatten(0, 1))
    rows = p.loss(p.sharpnesses[0] if p.sharpnesses else None, [5, 6, 5], False)
    losses = rows(outputs, targets.flatten(0, 1))
    assert losses.shape == (12,)
    torch.testing.assert_close(rows(outputs[4:8], targets[1]), losses[4:8])  # rows of replicas do not meet
    parts = {part: p.held_out(part) for part in ("validation", "test")}  # type: ignore[arg-type]
    assert torch.equal(p.held_out("test")[0], parts["test"][0])
    assert not torch.equal(parts["validation"][0], parts["test"][0])
    held, wanted = parts["validation"]
    with torch.no_grad():
        scores = p.score(p.network()(held).expand(2, len(held), *outputs.shape[1:]), wanted)
    assert scores.shape == (2, len(held))
    assert scores.min() >= 0
    assert scores.max() <= 1
    assert scores.dtype == torch.float64


def test_numbers_are_what_their_images_show() -> None:
    images, labels = digit_images("validation")
    written, numbers = write_numbers("validation", (3, 2), 2, torch.Generator().manual_seed(0))
    assert written.shape == (3, 2, 8, 16)
    for picture, number in zip(written.flatten(0, 1), numbers.flatten().tolist(), strict=True):
        for half, digit in ((picture[:, :8], number // 10), (picture[:, 8:], number % 10)):
            (found,) = (images == half).flatten(1).all(1).nonzero().flatten().tolist()
            assert labels[found] == digit


def test_ndcg_by_hand() -> None:
    """Grades 3, 0, 1 in the order 1, 3, 0: (1 + 7 / log2 3) / (7 + 1 / log2 3)."""
    scores, grades = torch.tensor([[2.0, 1.0, 3.0]]), torch.tensor([[3, 0, 1]])
    expected = (1 + 7 / math.log2(3)) / (7 + 1 / math.log2(3))
    assert ndcg(scores, grades, 3).item() == pytest.approx(expected)
    assert ndcg(scores, grades, 1).item() == pytest.approx(1 / 7)
    assert ndcg(-scores, 0 * grades, 3).item() == 1.0


def test_the_loss_is_one_less_ndcg_where_the_sort_is_hard() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(6, 10, generator=generator, dtype=torch.float64).argsort(-1).double()
    grades = torch.randint(GRADES, (6, 10), generator=generator)
    torch.testing.assert_close(EVERY["ndcg_10"].loss(0.01, [0], False)(scores, grades), 1 - ndcg(scores, grades, 5))
    each = [ndcg_loss(s, g, k=5, temperature=0.3) for s, g in zip(scores, grades, strict=True)]
    torch.testing.assert_close(EVERY["ndcg_10"].loss(0.3, [0], False)(scores, grades), torch.stack(each))


def _one_hot(best: list[int]) -> Tensor:
    return nn.functional.one_hot(torch.tensor(best), CLASSES).double()


@pytest.mark.parametrize(
    ("best", "read"),
    [
        ([3, 3, BLANK, 3, 5, 5], [3, 3, 5]),  # a blank parts two of a kind
        ([BLANK, 3, 3, 3, 5, 7], [3, 5, 7]),
        ([BLANK, 3, 3, 3, 5, BLANK], [-1, -1, -1]),  # two labels are not three
        ([1, 2, 3, 4, BLANK, BLANK], [-1, -1, -1]),  # nor are four
        ([BLANK] * 6, [-1, -1, -1]),
    ],
)
def test_greedy_decoding(best: list[int], read: list[int]) -> None:
    outputs = torch.stack([_one_hot(best), _one_hot([9, 8, 7, 7, 7, 7])])
    assert greedy_decode(outputs, 3).tolist() == [read, [9, 8, 7]]


def test_ctc_sums_over_alignments() -> None:
    """Three windows and the label 4: alignments with one run of 4."""
    outputs = torch.randn(1, 3, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = outputs[0].softmax(-1)
    runs = [(i, j) for i in range(3) for j in range(i + 1, 4)]
    total = sum(math.prod(float(p[t, 4 if i <= t < j else BLANK]) for t in range(3)) for i, j in runs)
    loss = EVERY["ctc_4"].loss(None, [0], False)(outputs, torch.tensor([[4]]))
    assert loss.item() == pytest.approx(-math.log(total))


def test_lines_show_their_digits_in_order() -> None:
    images, labels = digit_images("train")
    (lines, read), *_ = EVERY["ctc_4"].batches([3], 2, 1)
    for line, digits in zip(lines[0], read[0].tolist(), strict=True):
        windows = line.unfold(-1, 8, 1).movedim(1, 0)  # every column, (T, 8, 8)
        found = [(t, int(labels[k])) for t, w in enumerate(windows) for k in (images == w).flatten(1).all(1).nonzero()]
        assert [digit + 1 for _, digit in found] == digits
        starts = [t for t, _ in found]
        assert all(8 <= b - a <= 11 for a, b in pairwise(starts))
        assert starts[0] <= 3


def test_decisions_are_the_best_of_many() -> None:
    generator = torch.Generator().manual_seed(0)
    returns = torch.rand(3, 8, generator=generator, dtype=torch.float64)
    weights = allocate(returns)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, dtype=torch.float64))
    assert (weights > -1e-9).all()
    others = torch.distributions.Dirichlet(torch.full((8,), 0.3)).sample((20000,)).double()
    assert (utility(others.unsqueeze(1), returns).max(0).values <= utility(weights, returns) + 1e-9).all()
    torch.testing.assert_close(regret(returns + 3.0, returns), torch.zeros(3, dtype=torch.float64))  # level is idle
    assert (regret(returns.flip(-1), returns) > 0).all()


def test_the_score_of_a_decision() -> None:
    p = EVERY["allocation_8"]
    returns = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(p.score(returns, returns), torch.ones(5, dtype=torch.float64))
    half = p.score(returns.flip(-1), returns)  # a forecast that misleads
    equal = utility(torch.full_like(returns, 1 / 8), returns)
    gain = utility(allocate(returns.flip(-1)), returns) - equal
    torch.testing.assert_close(half, (gain / (utility(allocate(returns), returns) - equal)).clamp(0, 1))
    assert half.min() == 0.0
    lost = torch.full((2, 5, 8), float("nan"), dtype=torch.float64)
    assert p.score(lost, returns).isfinite().all()


def test_a_forecast_beyond_all_bounds_ends_no_other() -> None:
    forecasts = torch.zeros(2, 8)
    forecasts[0] = float("nan")
    found = allocate(forecasts)
    assert found[0].isnan().all()
    torch.testing.assert_close(found[1:], allocate(forecasts[1:]))
