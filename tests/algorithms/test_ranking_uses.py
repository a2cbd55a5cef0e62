"""What is made of P: soft ranks, Spearman's loss, top-k, NDCG, average precision; against their hard twins."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from newton_plugin import _errors as errors
from newton_plugin.algorithms import (
    average_precision_loss,
    ndcg_loss,
    neural_sort,
    soft_rank,
    soft_top_k,
    spearman_loss,
)

SHARP = {
    "neural_sort": {"temperature": 1e-6},
    "soft_sort": {"temperature": 1e-6},
    "sorting_network": {"steepness": 1e6},
}
SOFT = {
    "neural_sort": {"temperature": 0.8},
    "soft_sort": {"temperature": 0.8},
    "sorting_network": {"steepness": 2.0, "swap": "cauchy"},
}
every_method = pytest.mark.parametrize("method", SHARP)


def _scores(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@every_method
def test_soft_ranks_become_the_ranks(method: str) -> None:
    scores = _scores(4, 6)
    hard = scores.argsort(-1).argsort(-1).double()
    torch.testing.assert_close(soft_rank(scores, method, **SHARP[method]), hard)
    soft = soft_rank(scores, method, **SOFT[method])
    assert ((soft >= 0) & (soft <= 5)).all()
    assert (soft - hard).abs().max() > 0.01


@every_method
def test_tied_elements_share_their_rank(method: str) -> None:
    ranks = soft_rank(torch.tensor([2.0, 2.0, 2.0]), method, **SOFT[method])
    if method != "sorting_network":  # a network of 3 wires does not treat its wires alike
        torch.testing.assert_close(ranks, torch.ones(3))
    torch.testing.assert_close(ranks.sum(), torch.tensor(3.0))


@every_method
def test_spearman_loss_is_the_coefficient_from_the_textbook(method: str) -> None:
    scores, ranks = _scores(5, 7), torch.rand(5, 7, generator=torch.Generator().manual_seed(0)).argsort(-1)
    both = torch.stack((scores.argsort(-1).argsort(-1), ranks), 1).double()
    rho = torch.stack([torch.corrcoef(pair)[0, 1] for pair in both])
    torch.testing.assert_close(spearman_loss(scores, ranks, method, **SHARP[method]), (1 - rho).mean())


def test_spearman_loss_takes_the_mean_rank_of_tied_targets() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 3.0])
    expected = ((torch.arange(4.0) - torch.tensor([0.0, 1.5, 1.5, 3.0])) ** 2).sum() * 6 / (4 * 15)
    got = spearman_loss(scores, torch.tensor([0, 5, 5, 9]), temperature=1e-6)
    torch.testing.assert_close(got, expected)
    assert spearman_loss(torch.tensor([1.0]), torch.tensor([0]), temperature=1.0) == 0


@every_method
@pytest.mark.parametrize("largest", [True, False])
def test_top_k_is_torch_topk_and_the_rows_of_p(method: str, largest: bool) -> None:
    scores = _scores(3, 20)
    hard = soft_top_k(scores, 4, method, largest=largest, **SHARP[method]) @ scores.unsqueeze(-1)
    torch.testing.assert_close(hard.squeeze(-1), scores.topk(4, largest=largest).values)
    some = soft_top_k(scores, 4, method, largest=largest, **SOFT[method])
    every = soft_top_k(scores, 20, method, largest=largest, **SOFT[method])
    assert some.shape == (3, 4, 20)
    torch.testing.assert_close(some, every[:, :4])


def test_top_k_of_a_callable_cuts_its_p() -> None:
    scores = _scores(5)
    got = soft_top_k(scores, 2, partial(neural_sort, temperature=0.5))
    torch.testing.assert_close(got, soft_top_k(scores, 2, temperature=0.5))


def _hard_ndcg(scores: Tensor, relevance: Tensor, k: int) -> float:
    def dcg(order: Tensor) -> float:
        return sum(
            (2 ** relevance[j].item() - 1) / torch.log2(torch.tensor(2.0 + i)).item() for i, j in enumerate(order[:k])
        )

    return dcg(scores.argsort(descending=True)) / dcg(relevance.argsort(descending=True))


@every_method
@pytest.mark.parametrize("k", [None, 3])
def test_ndcg_becomes_ndcg(method: str, k: int | None) -> None:
    scores = _scores(4, 8)
    relevance = torch.randint(0, 4, (4, 8), generator=torch.Generator().manual_seed(0))
    hard = [_hard_ndcg(s, r, k or 8) for s, r in zip(scores, relevance, strict=True)]
    got = ndcg_loss(scores, relevance, method, k=k, **SHARP[method])
    torch.testing.assert_close(got.item(), 1 - sum(hard) / 4, rtol=1e-6, atol=0)


def _hard_average_precision(scores: Tensor, relevance: Tensor) -> float:
    found, total = 0, 0.0
    for i, j in enumerate(scores.argsort(descending=True).tolist(), start=1):
        if relevance[j]:
            found += 1
            total += found / i
    return total / found


@every_method
def test_average_precision_becomes_average_precision(method: str) -> None:
    scores = _scores(4, 8)
    relevance = torch.rand(4, 8, generator=torch.Generator().manual_seed(5)) > 0.5
    hard = [_hard_average_precision(s, r) for s, r in zip(scores, relevance, strict=True)]
    got = average_precision_loss(scores, relevance, method, **SHARP[method])
    torch.testing.assert_close(got.item(), 1 - sum(hard) / 4, rtol=1e-9, atol=0)


def test_lists_without_a_relevant_element_cost_nothing() -> None:
    scores = _scores(2, 4).requires_grad_()
    relevance = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0]])
    for loss in (ndcg_loss, average_precision_loss):
        value = loss(scores, relevance, temperature=0.5)
        torch.testing.assert_close(value, loss(scores[1:], relevance[1:], temperature=0.5) / 2)
        (gradient,) = torch.autograd.grad(value, scores)
        assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))
        assert gradient.isfinite().all()


@every_method
def test_first_and_second_derivatives_of_all(method: str) -> None:
    scores = _scores(5).requires_grad_()
    ranks, relevance = torch.tensor([2, 0, 1, 4, 3]), torch.tensor([0, 1, 0, 2, 1])
    options = SOFT[method]
    for f in (
        lambda s: soft_rank(s, method, **options),
        lambda s: soft_top_k(s, 2, method, **options),
        lambda s: spearman_loss(s, ranks, method, **options),
        lambda s: ndcg_loss(s, relevance, method, k=3, **options),
        lambda s: average_precision_loss(s, relevance > 0, method, **options),
    ):
        assert torch.autograd.gradcheck(f, scores, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(f, scores)
        torch.func.vmap(f)(scores.detach().expand(2, 5))


def test_what_they_refuse() -> None:
    scores, ranks = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(errors.ArgumentError, match=r"k must be from 1 to the length of the lists, 3; got 4"):
        soft_top_k(scores, 4, temperature=1.0)
    with pytest.raises(errors.ArgumentTypeError, match=r"k must be an int; got 1\.0"):
        soft_top_k(scores, 1.0, temperature=1.0)  # type: ignore[arg-type]
    with pytest.raises(errors.ArgumentTypeError, match=r"ranks must be a tensor of integers"):
        spearman_loss(scores, scores, temperature=1.0)
    with pytest.raises(errors.ShapeError, match=r"scores and ranks must have the same shape.*\(2, 3\) and \(3,\)"):
        spearman_loss(scores, ranks[0], temperature=1.0)
    with pytest.raises(errors.ShapeError, match=r"scores and relevance must have the same shape"):
        ndcg_loss(scores, ranks[0], temperature=1.0)
    with pytest.raises(errors.ArgumentError, match=r"gain must be one of 'exponential', 'linear'; got 'cubic'"):
        ndcg_loss(scores, ranks, gain="cubic", temperature=1.0)
    with pytest.raises(errors.ArgumentTypeError, match=r"relevance must be a tensor; got list"):
        average_precision_loss(scores, [0, 1], temperature=1.0)  # type: ignore[arg-type]
    with pytest.raises(errors.ArgumentError, match=r"method must be one of .*got 'quick'"):
        soft_rank(scores, "quick")
