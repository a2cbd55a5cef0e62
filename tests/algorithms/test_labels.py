"""Labels: what is outside their domain is refused or NaN, never a number; what is inside gives the textbook's value."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from newton_plugin import ArgumentError, ArgumentTypeError, ShapeError
from newton_plugin.algorithms import (
    RankingLoss,
    SortingNetwork,
    average_precision_loss,
    ndcg_loss,
    shortest_path_graph,
    spearman_loss,
)
from newton_plugin.algorithms._ranking import labels

Loss = Callable[..., Tensor]
NAN, INF = math.nan, math.inf
SHARP: dict[str, dict[str, Any]] = {
    "neural_sort": {"temperature": 1e-6},
    "soft_sort": {"temperature": 1e-6},
    "sorting_network": {"steepness": 1e6},
}
every_method = pytest.mark.parametrize("method", SHARP)


def ranking_loss(
    scores: Tensor, ranks: Tensor, method: str = "neural_sort", *, mask: Any = None, **options: Any
) -> Tensor:
    return RankingLoss(method, **options)(scores, ranks, mask)


def linear_ndcg(*args: Any, **options: Any) -> Tensor:
    return ndcg_loss(*args, gain="linear", **options)


LOSSES: dict[str, Loss] = {
    "ndcg": ndcg_loss,
    "linear ndcg": linear_ndcg,
    "average precision": average_precision_loss,
    "spearman": spearman_loss,
    "ranking": ranking_loss,
}
SCORES = torch.tensor([3.0, 2.0, 1.0, 4.0])
OUTSIDE = {
    "ndcg": [-1.0, -100.0, -0.5, NAN, INF, -INF],
    "linear ndcg": [-1.0, -100.0, NAN, INF],
    "average precision": [-1.0, -100.0, 2.0, 0.5, NAN, INF],
    "spearman": [-1, -100],
    "ranking": [-1, -100],
}
outside = pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in OUTSIDE.items() for v in values])


def _with(value: float) -> Tensor:
    """Good labels but for the last."""
    return torch.tensor([0, 1, 1, value])


@outside
def test_labels_outside_their_domain_are_refused(name: str, value: float) -> None:
    shown = "nan" if math.isnan(value) else f"{value:g}".replace("-", r"\-")
    what = "ranks" if name in ("spearman", "ranking") else "relevance"
    said = rf"{what} must .*; got {shown}.* at index \(3,\)\. If this is padding, pass mask="
    with pytest.raises(ArgumentError, match=said):
        LOSSES[name](SCORES, _with(value), temperature=0.1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_so_is_padding_in_integers(name: str, dtype: torch.dtype) -> None:
    both = torch.stack((_with(0), _with(-100))).to(dtype)
    with pytest.raises(ArgumentError, match=r"got -100 at index \(1, 3\)"):
        LOSSES[name](SCORES.expand(2, 4), both, temperature=0.1)


@outside
def test_a_mask_makes_padding_harmless(name: str, value: float) -> None:
    mask = torch.tensor([True, True, True, False])
    scores = SCORES.clone().requires_grad_()
    loss = LOSSES[name](scores, _with(value), mask=mask, temperature=0.1)
    short = SCORES[:3].clone().requires_grad_()
    alone = LOSSES[name](short, _with(0)[:3], temperature=0.1)
    torch.testing.assert_close(loss, alone)
    (g,) = torch.autograd.grad(loss, scores)
    torch.testing.assert_close(g[:3], torch.autograd.grad(alone, short)[0])
    assert g[3] == 0


def test_the_figures_of_the_report() -> None:
    """Padding of -1 gave 1.75; the list without it has AP = (1/2 + 2/3)/2."""
    relevance = torch.tensor([0, 1, 1, -1])
    mask = relevance >= 0
    loss = average_precision_loss(SCORES, relevance, mask=mask, temperature=0.01)
    torch.testing.assert_close(loss.item(), 1 - (1 / 2 + 2 / 3) / 2, rtol=1e-6, atol=0)
    large = ndcg_loss(torch.tensor([2.0, 1.0]), torch.tensor([0, 130]), temperature=0.01)
    torch.testing.assert_close(large.item(), 1 - 1 / math.log2(3), rtol=1e-6, atol=0)


WRONG: list[tuple[Any, Any, type[Exception], str]] = [
    ([0, 1, 1, 0], None, ArgumentTypeError, "got list"),
    (torch.tensor([0, 1, 1, 0j]), None, ArgumentTypeError, r"got torch\.complex64"),
    (torch.tensor([0, 1, 1]), None, ShapeError, r"got \(4,\) and \(3,\)"),
    (torch.tensor([[0], [1], [1], [0]]), None, ShapeError, r"got \(4,\) and \(4, 1\)"),
    (
        torch.tensor([0, 1, 1, 0]),
        torch.ones(4),
        ArgumentTypeError,
        r"mask must be a boolean tensor.*got torch\.float32",
    ),
    (torch.tensor([0, 1, 1, 0]), [True] * 4, ArgumentTypeError, "mask must be a boolean tensor.*got list"),
    (torch.tensor([0, 1, 1, 0]), torch.ones(3, dtype=torch.bool), ShapeError, r"mask must have the shape.*\(3,\)"),
]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("given", "mask", "error", "match"), WRONG)
def test_wrong_types_and_shapes(name: str, given: Any, mask: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        LOSSES[name](SCORES, given, mask=mask, temperature=0.1)


@pytest.mark.parametrize("name", LOSSES)
def test_a_mask_needs_a_method_that_knows_lengths(name: str) -> None:
    class NoLengths:
        def log_probabilities(self, scores: Tensor) -> tuple[Tensor, Tensor]:
            raise AssertionError("called without lengths")

    for method in (lambda s: torch.eye(4), NoLengths()):
        with pytest.raises(ArgumentTypeError, match="mask needs a method that knows list lengths"):
            LOSSES[name](SCORES, torch.tensor([0, 1, 1, 0]), method, mask=torch.ones(4, dtype=torch.bool))


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS, *FLOATS])
def test_labels_of_every_dtype(name: str, dtype: torch.dtype) -> None:
    given = torch.tensor([0, 1, 1, 0])
    if dtype.is_floating_point and name in ("spearman", "ranking"):
        with pytest.raises(ArgumentTypeError, match="ranks must be a tensor of integers"):
            LOSSES[name](SCORES, given.to(dtype), temperature=0.1)
        return
    expected = LOSSES[name](SCORES, given, temperature=0.1)
    assert torch.equal(LOSSES[name](SCORES, given.to(dtype), temperature=0.1), expected)
    mask = torch.tensor([True, True, False, True])
    expected = LOSSES[name](SCORES, given, mask=mask, temperature=0.1)
    assert torch.equal(LOSSES[name](SCORES, given.to(dtype), mask=mask, temperature=0.1), expected)


def _ndcg(scores: list[float], relevance: list[float], linear: bool = False) -> float:
    """In exact fractions, so that no grade is too large."""
    gains = [Fraction(r) if linear else Fraction(2) ** int(r) - 1 for r in relevance]

    def discounted(g: list[Fraction]) -> Fraction:
        return sum((x * Fraction(1 / math.log2(i + 2)) for i, x in enumerate(g)), Fraction(0))

    ranked = [g for _, g in sorted(zip(scores, gains, strict=True), key=lambda pair: -pair[0])]
    return float(discounted(ranked) / discounted(sorted(gains, reverse=True)))


GRADES = [1, 15, 16, 17, 63, 64, 65, 100, 127, 128, 130, 1000, 1023, 1024, 1100, 100_000]


@every_method
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("grade", GRADES)
def test_grades_of_any_size(method: str, dtype: torch.dtype, grade: int) -> None:
    scores, relevance = [2.0, 1.0, 3.0, 0.5], [0, grade, 0, max(grade - 1, 0)]
    x = torch.tensor(scores, dtype=dtype, requires_grad=True)
    loss = ndcg_loss(x, torch.tensor(relevance), method, **SHARP[method])
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.item(), 1 - _ndcg(scores, relevance), rtol=1e-5, atol=1e-6)
    (g,) = torch.autograd.grad(loss, x)
    assert g.dtype == dtype
    assert g.isfinite().all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("grade", [1.0, 7e4, 1e20, 3e38])
def test_linear_gains_of_any_size(dtype: torch.dtype, grade: float) -> None:
    scores, relevance = [2.0, 1.0, 3.0, 0.5], [0.0, grade, 0.0, grade / 2]
    loss = linear_ndcg(torch.tensor(scores, dtype=dtype), torch.tensor(relevance), temperature=1e-6)
    torch.testing.assert_close(loss.item(), 1 - _ndcg(scores, relevance, linear=True), rtol=1e-5, atol=1e-6)


def test_soft_lists_with_large_grades() -> None:
    """A power of two divides both sums: float32 agrees with float64, where 2^300 still is a number."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    relevance = torch.randint(280, 300, (5, 7), generator=generator)
    p = torch.softmax(
        (
            (8 - 2 * torch.arange(1, 8)).unsqueeze(-1) * scores.unsqueeze(-2)
            - (scores.unsqueeze(-1) - scores.unsqueeze(-2)).abs().sum(-1).unsqueeze(-2)
        )
        / 0.7,
        -1,
    )  # NeuralSort, descending
    g = torch.exp2(relevance.double()) - 1
    discount = 1 / torch.log2(torch.arange(2, 9, dtype=torch.float64))
    ideal = (g.sort(-1, descending=True).values * discount).sum(-1)
    expected = (1 - ((p @ g.unsqueeze(-1)).squeeze(-1) * discount).sum(-1) / ideal).mean()
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        loss = ndcg_loss(scores.to(dtype), relevance, temperature=0.7)
        torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_scikit_learn(method: str, dtype: torch.dtype) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(1)
    for n in (2, 5, 12):
        scores = torch.rand(n, generator=generator, dtype=torch.float64).add(torch.randperm(n, generator=generator))
        relevance = torch.randint(0, 5, (n,), generator=generator)
        relevance[0] = 3
        x, tolerance = scores.to(dtype), {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
        for k in (None, 1, n - 1):
            loss = ndcg_loss(x, relevance, method, k=k, **SHARP[method])
            expected = metrics.ndcg_score([(2**relevance - 1).tolist()], [scores.tolist()], k=k)
            torch.testing.assert_close(1 - loss.item(), float(expected), **tolerance)
        binary = (relevance > 2).long()
        loss = average_precision_loss(x, binary, method, **SHARP[method])
        expected = metrics.average_precision_score(binary.tolist(), scores.tolist())
        torch.testing.assert_close(1 - loss.item(), float(expected), **tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_over_long_lists_in_half_precision(dtype: torch.dtype) -> None:
    """The sum of squared rank differences, 333,300 here, is not a float16 number."""
    scores = torch.arange(100, dtype=dtype)
    loss = spearman_loss(scores.flip(0), torch.arange(100), temperature=0.01)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.item(), 2.0)
    assert spearman_loss(scores, torch.arange(100), temperature=0.01).item() == pytest.approx(0, abs=1e-6)
    ones = average_precision_loss(scores, torch.ones(100), temperature=0.01)
    assert ones.item() == pytest.approx(0, abs=1e-6)


@every_method
@pytest.mark.parametrize("masked", [False, True])
def test_lists_with_nothing_to_rank(method: str, masked: bool) -> None:
    """All relevant alike or none, all masked, one element: the documented 0, and a gradient of zeros."""
    options: dict[str, Any] = {"steepness": 2.0} if method == "sorting_network" else {"temperature": 0.5}
    for shape in ((3, 4), (3, 1), (1,)):
        for name, loss in LOSSES.items():
            scores = torch.linspace(-1, 1, math.prod(shape)).reshape(shape).requires_grad_()
            mask = torch.zeros(shape, dtype=torch.bool) if masked else None
            if not masked and shape == (3, 4) and name in ("spearman", "ranking"):
                continue  # equal ranks are a full list
            value = loss(scores, torch.zeros(shape, dtype=torch.long), method, mask=mask, **options)
            assert value.item() == 0
            (g,) = torch.autograd.grad(value, scores)
            assert torch.equal(g, torch.zeros(shape))


@every_method
def test_equal_labels(method: str) -> None:
    """If all are relevant every order is ideal; equal ranks are the mean rank, as equal scores are."""
    options: dict[str, Any] = {"steepness": 2.0} if method == "sorting_network" else {"temperature": 0.5}
    scores, ones = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(3, 4, dtype=torch.long)
    for name in ("ndcg", "linear ndcg", "average precision"):
        assert LOSSES[name](scores, ones, method, **options).item() == pytest.approx(0, abs=1e-6)
    if method != "sorting_network":  # whose wires are not alike
        assert spearman_loss(torch.zeros(3, 4), ones, method, **options).item() == pytest.approx(0, abs=1e-6)
    loss = ranking_loss(scores, ones, method, **options)
    assert torch.equal(loss, ranking_loss(scores, 7 * ones, method, **options))


def _lists(name: str, good: bool = True) -> tuple[Tensor, Tensor]:
    scores = torch.randn(4, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    given = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 0, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 0]])
    if not good:
        given[2, 3] = -1
    return scores, given


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("masked", [False, True])
def test_where_nobody_looks_bad_lists_are_nan_and_good_ones_equal(
    name: str, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a device: no bit of a good list changes, a bad one is NaN unless it is masked."""
    loss, options = LOSSES[name], {"temperature": 0.3}
    scores, given = _lists(name)
    mask = torch.ones(4, 5, dtype=torch.bool) if masked else None
    looked = loss(scores, given, mask=mask, **options)
    monkeypatch.setattr(labels, "can_look", lambda tensor: False)
    assert torch.equal(loss(scores, given, mask=mask, **options), looked)
    _, bad = _lists(name, good=False)
    assert loss(scores, bad, mask=mask, **options).isnan()
    for i in range(4):
        alone = loss(scores[i], bad[i], mask=None if mask is None else mask[i], **options)
        assert alone.isnan().item() == (i == 2)
    if mask is not None:
        mask[2, 3] = False
        assert loss(scores, bad, mask=mask, **options).isfinite()


@pytest.mark.parametrize("name", LOSSES)
def test_transforms_and_the_compiler_neither_fail_nor_look(name: str) -> None:
    loss = LOSSES[name]
    scores, good = _lists(name)
    bad = _lists(name, good=False)[1]

    def of(s: Tensor, t: Tensor) -> Tensor:
        return loss(s, t, temperature=0.3)

    each = torch.stack([of(s, t) for s, t in zip(scores, good, strict=True)])
    torch.testing.assert_close(torch.func.vmap(of)(scores, good), each, rtol=1e-12, atol=1e-14)
    assert torch.func.vmap(of)(scores, bad).isnan().tolist() == [False, False, True, False]
    asked = scores.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(of(asked, good), asked)
    torch.testing.assert_close(torch.func.grad(of)(scores, good), gradient, rtol=1e-12, atol=1e-14)
    hessian = torch.func.hessian(of)(scores, good)
    assert hessian.shape == (4, 5, 4, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own
        compiled = torch.compile(of, backend="eager")
        torch.testing.assert_close(compiled(scores, good), of(scores, good), rtol=1e-12, atol=1e-14)
        assert compiled(scores, bad).isnan()
    torch.compiler.reset()


@pytest.mark.parametrize("layout", ["odd_even", "bitonic"])
def test_lengths_of_a_network(layout: str) -> None:
    """What ``log_probabilities`` of a SortingNetwork takes."""
    network, scores = SortingNetwork(4, layout), SCORES.expand(2, 4)
    for lengths, error, match in (
        ([2, 3], ArgumentTypeError, "got list"),
        (torch.tensor([2.0, 3.0]), ArgumentTypeError, r"got torch\.float32"),
        (torch.tensor([2]), ShapeError, r"shape \(2,\); got \(1,\)"),
        (torch.tensor([2, 3, 4]), ShapeError, r"got \(3,\)"),
        (torch.tensor([-1, 4]), ArgumentError, r"the padded lists, 4; got -1 to 4"),
        (torch.tensor([2, 5]), ArgumentError, r"got 2 to 5"),
    ):
        with pytest.raises(error, match=match):
            network.log_probabilities(scores, lengths)  # type: ignore[arg-type]
    log_p, _ = network.log_probabilities(scores, torch.tensor([0, 4], dtype=torch.uint8))
    torch.testing.assert_close(log_p[1], network.log_probabilities(SCORES)[0])


def test_vertices_of_a_graph() -> None:
    costs, edges = torch.tensor([5.0, 1.0, 3.0]), torch.tensor([[0, 0, 1], [2, 1, 2]])
    with pytest.raises(ArgumentTypeError, match=r"num_nodes must be an integer.*got 3\.0"):
        shortest_path_graph(costs, edges, 0, 2, 3.0)  # type: ignore[arg-type]
    for padding in (-1, -100, 7):
        with pytest.raises(ArgumentError, match=r"edges must join vertices 0 to num_nodes - 1 = 2.*leave padding out"):
            shortest_path_graph(costs, edges.index_fill(1, torch.tensor([2]), padding), 0, 2, 3)
    assert shortest_path_graph(costs, edges, 0, 2, np.int64(3)).distance.item() == 4  # type: ignore[arg-type]
