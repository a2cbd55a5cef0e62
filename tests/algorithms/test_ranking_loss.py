"""RankingLoss: what it means, how it is called, what it refuses."""

from __future__ import annotations

from functools import partial
from itertools import permutations

import pytest
import torch
from torch import Tensor

from newton_plugin import _errors as errors
from newton_plugin.algorithms import RankingLoss, neural_sort

METHODS = {
    "neural_sort": (RankingLoss("neural_sort", temperature=0.7), partial(neural_sort, temperature=0.7)),
}
every_method = pytest.mark.parametrize(("loss", "p"), METHODS.values(), ids=METHODS)


def _batch(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(*shape, generator=generator, dtype=dtype)
    return scores, torch.rand(*shape, generator=generator).argsort(-1)


@every_method
def test_it_is_the_mean_binary_cross_entropy_of_p(loss: RankingLoss, p) -> None:
    scores, ranks = _batch(6, 5)
    truth = torch.nn.functional.one_hot(ranks.argsort(-1), 5).double()  # row i: the element of rank i
    assert torch.equal(torch.arange(5.0).double().expand(6, 5), (truth @ ranks.double().unsqueeze(-1)).squeeze(-1))
    expected = torch.nn.functional.binary_cross_entropy(p(scores), truth)
    torch.testing.assert_close(loss(scores, ranks), expected, rtol=1e-12, atol=0)


@every_method
def test_first_and_second_derivatives_in_float64(loss: RankingLoss, p) -> None:
    scores, ranks = _batch(2, 4)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: loss(s, ranks), scores)
    assert torch.autograd.gradgradcheck(lambda s: loss(s, ranks), scores)
    assert torch.autograd.gradcheck(p, scores, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(p, scores)


@every_method
def test_autograd_and_torch_func_agree(loss: RankingLoss, p) -> None:
    scores, ranks = _batch(3, 4)
    x = scores.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(x, ranks), x, create_graph=True)
    rows = [torch.autograd.grad(g, x, retain_graph=True)[0].flatten() for g in gradient.flatten()]
    hessian = torch.stack(rows).reshape(3, 4, 3, 4)

    per_list = torch.func.vmap(torch.func.grad(loss))(scores, ranks) / 3
    torch.testing.assert_close(per_list, gradient.detach(), rtol=1e-12, atol=1e-15)
    blocks = torch.func.vmap(torch.func.hessian(loss))(scores, ranks) / 3
    for i in range(3):
        torch.testing.assert_close(hessian[i, :, i], blocks[i], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(
        torch.func.jacrev(torch.func.jacrev(loss))(scores, ranks), hessian, rtol=1e-10, atol=1e-14
    )
    v = torch.ones_like(scores)
    value, slope = torch.func.jvp(lambda s: loss(s, ranks), (scores,), (v,))
    torch.testing.assert_close(slope, (gradient.detach() * v).sum())
    torch.testing.assert_close(value, loss(scores, ranks))


@every_method
def test_any_leading_dimensions_and_reductions(loss: RankingLoss, p) -> None:
    scores, ranks = _batch(2, 3, 4)
    each = RankingLoss(loss.method, reduction="none")(scores, ranks)
    assert each.shape == (2, 3)
    one_by_one = [loss(s, r) for s, r in zip(scores.flatten(0, 1), ranks.flatten(0, 1), strict=True)]
    torch.testing.assert_close(each.flatten(), torch.stack(one_by_one))
    torch.testing.assert_close(loss(scores, ranks), each.mean())
    torch.testing.assert_close(RankingLoss(loss.method, reduction="sum")(scores, ranks), each.sum())


@every_method
def test_tied_ranks_mean_the_average_over_the_ways_to_break_them(loss: RankingLoss, p) -> None:
    scores, _ = _batch(4)
    expected = torch.stack([loss(scores, torch.tensor([a, 0, b, c])) for a, b, c in permutations((1, 2, 3))]).mean()
    for ranks in ([1, 0, 1, 1], [3, 0, 3, 3]):
        torch.testing.assert_close(loss(scores, torch.tensor(ranks)), expected)


@every_method
def test_a_right_order_costs_nothing_and_a_single_element_neither(loss: RankingLoss, p) -> None:
    ranks = torch.tensor([2, 0, 1, 3])
    assert loss(1e6 * ranks.float(), ranks) < 1e-6
    x = torch.tensor([[0.3], [2.0]], requires_grad=True)
    single = loss(x, torch.zeros(2, 1, dtype=torch.long))
    single.backward()
    assert single == 0
    assert torch.equal(x.grad, torch.zeros(2, 1))


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_and_autocast(loss: RankingLoss, p, dtype: torch.dtype) -> None:
    scores, ranks = _batch(3, 5)
    half = scores.to(dtype).requires_grad_()
    value = loss(half, ranks)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.detach(), loss(half.detach().double(), ranks).float())
    value.backward()
    assert half.grad.dtype == dtype
    single = scores.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(single, ranks)
    assert torch.equal(inside, loss(single, ranks))


def test_a_function_and_its_name_are_the_same_method() -> None:
    scores, ranks = _batch(3, 4)
    by_name = RankingLoss("neural_sort", temperature=0.2)
    by_function = RankingLoss(neural_sort, temperature=0.2)
    assert torch.equal(by_name(scores, ranks), by_function(scores, ranks))
    assert "temperature=0.2" in repr(by_name)


def test_any_callable_that_gives_p() -> None:
    scores, ranks = _batch(3, 4)
    plain = RankingLoss(partial(neural_sort, temperature=1.0))
    stable = RankingLoss("neural_sort", temperature=1.0)
    torch.testing.assert_close(plain(scores, ranks), stable(scores, ranks))


def test_what_it_refuses() -> None:
    scores, ranks = _batch(3, 4)
    loss = RankingLoss("neural_sort", temperature=0.1)
    with pytest.raises(errors.ArgumentError, match=r"method must be one of 'neural_sort'.*got 'bubble'.*callable"):
        RankingLoss("bubble")
    with pytest.raises(errors.ArgumentTypeError, match=r"method must be one of .* or a callable.*got int"):
        RankingLoss(3)  # type: ignore[arg-type]
    with pytest.raises(errors.ArgumentTypeError, match=r"\['temperature'\] belong to a method given by name.*partial"):
        RankingLoss(lambda s: s, temperature=0.1)
    with pytest.raises(errors.ArgumentError, match=r"reduction must be one of 'mean', 'sum', 'none'; got 'avg'"):
        RankingLoss("neural_sort", temperature=0.1, reduction="avg")
    with pytest.raises(errors.ArgumentError, match=r"temperature must be positive and finite; got 0\. Smaller is"):
        RankingLoss("neural_sort", temperature=0)
    with pytest.raises(errors.ArgumentTypeError, match=r"ranks must be a tensor of integers.*float64.*argsort"):
        loss(scores, ranks.double())
    with pytest.raises(errors.ArgumentTypeError, match=r"ranks must be a tensor of integers.*list"):
        loss(scores, ranks.tolist())
    with pytest.raises(errors.ShapeError, match=r"same shape.*\(3, 4, 1\) and \(3, 4\).*squeeze"):
        loss(scores.unsqueeze(-1), ranks)
    with pytest.raises(errors.ShapeError, match=r"n >= 1; got \(3, 0\)"):
        loss(scores[:, :0], ranks[:, :0])
    with pytest.raises(errors.ArgumentTypeError, match=r"scores must have a floating-point dtype; got torch.int64"):
        loss(ranks, ranks)
