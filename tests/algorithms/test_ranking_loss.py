"""RankingLoss: what it means, how it is called, what it refuses."""

from __future__ import annotations

from functools import partial
from itertools import permutations

import pytest
import torch
from torch import Tensor

from newton_plugin import _errors as errors
from newton_plugin.algorithms import RankingLoss, SortingNetwork, neural_sort, soft_sort


def _network(**kwargs):
    return lambda scores: SortingNetwork(scores.shape[-1], **kwargs)(scores)[1]


METHODS = {
    "neural_sort": (RankingLoss("neural_sort", temperature=0.7), partial(neural_sort, temperature=0.7)),
    "soft_sort": (RankingLoss("soft_sort", temperature=0.7), partial(soft_sort, temperature=0.7)),
    "soft_sort, p=2": (
        RankingLoss("soft_sort", temperature=0.7, p=2),
        partial(soft_sort, temperature=0.7, p=2),
    ),
    **{
        f"{layout} {swap}": (
            RankingLoss("sorting_network", layout=layout, swap=swap, steepness=2.0),
            _network(layout=layout, swap=swap, steepness=2.0),
        )
        for layout, swap in [
            ("odd_even", "logistic"),
            ("odd_even", "cauchy"),
            ("odd_even", "gaussian"),
            ("odd_even", "reciprocal"),
            ("bitonic", "optimal"),
            ("bitonic", "logistic"),
        ]
    },
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
    assert torch.autograd.gradcheck(p, scores, check_forward_ad=True)
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


@every_method
def test_ragged_lists_by_mask(loss: RankingLoss, p) -> None:
    """Every list as if it were alone, whatever it was padded to; also in a network of a power of two."""
    scores, _ = _batch(7, 9)
    lists = [[0, 1, 2, 3, 4, 5], [1, 4, 5], [2], [], [0, 2, 3, 5], list(range(9)), [0, 8, 2, 3, 4, 5, 6, 7]]
    mask = torch.zeros(7, 9, dtype=torch.bool)
    ranks = torch.full((7, 9), 99)
    expected = torch.zeros(7, dtype=torch.float64)
    each = RankingLoss(loss.method, reduction="none")
    gradient = torch.zeros(7, 9, dtype=torch.float64)
    for i, present in enumerate(lists):
        present = sorted(present)
        mask[i, present] = True
        ranks[i, present] = torch.randperm(len(present), generator=torch.Generator().manual_seed(i))
        if present:
            expected[i] = loss(scores[i, present], ranks[i, present])
            gradient[i, present] = torch.func.grad(loss)(scores[i, present], ranks[i, present])
    scores[~mask] = torch.nan  # whatever stands there does not matter
    torch.testing.assert_close(each(scores, ranks, mask), expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(loss(scores, ranks, mask), expected.mean())
    got = torch.func.grad(lambda s: each(s, ranks, mask).sum())(scores)
    torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-13)
    second = torch.func.jacrev(torch.func.grad(lambda s: each(s, ranks, mask).sum()))(scores)
    assert second.isfinite().all()


def test_several_lengths_in_one_module() -> None:
    loss = RankingLoss("sorting_network", swap="cauchy", steepness=3.0)
    for n in (2, 5, 4, 5):
        scores, ranks = _batch(2, n)
        expected = RankingLoss(SortingNetwork(n, swap="cauchy", steepness=3.0))(scores, ranks)
        assert torch.equal(loss(scores, ranks), expected)


def test_networks_made_inside_a_transform_can_be_used_outside() -> None:
    loss = RankingLoss("sorting_network", layout="bitonic", steepness=3.0)
    scores, ranks = _batch(3, 5)
    inside = torch.func.vmap(torch.func.grad(loss))(scores, ranks)
    fresh = RankingLoss("sorting_network", layout="bitonic", steepness=3.0)
    x = scores.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(3 * loss(x, ranks), x)
    torch.testing.assert_close(gradient, inside)
    assert torch.equal(loss(scores, ranks), fresh(scores, ranks))


def _train(loss: RankingLoss, seed: int = 0) -> float:
    """Scores that start far apart in a random order; Adam; the share of lists put in order."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(64, 5, generator=generator).argsort(-1)
    scores = (6 * torch.randn(64, 5, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([scores], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        loss(scores, ranks).backward()
        optimizer.step()
    return (scores.argsort(-1).argsort(-1) == ranks).all(-1).double().mean().item()


def test_training_recovers_from_a_saturated_wrong_start_and_the_textbook_loss_does_not() -> None:
    stable = RankingLoss("neural_sort", temperature=0.1)
    textbook = RankingLoss(partial(neural_sort, temperature=0.1))
    recovered, stuck = _train(stable), _train(textbook)
    assert recovered == 1.0
    assert stuck < 0.9


@pytest.mark.slow
@every_method
def test_torch_compile_without_graph_breaks(loss: RankingLoss, p) -> None:
    torch._dynamo.reset()
    scores, ranks = _batch(3, 5)
    x, y = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(x, ranks).backward()
    loss(y, ranks).backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(torch.compile(p, fullgraph=True, backend="aot_eager")(scores), p(scores))


def test_what_it_refuses() -> None:
    scores, ranks = _batch(3, 4)
    loss = RankingLoss("neural_sort", temperature=0.1)
    with pytest.raises(errors.ArgumentError, match=r"method must be one of 'neural_sort'.*got 'bubble'.*callable"):
        RankingLoss("bubble")
    with pytest.raises(errors.ArgumentTypeError, match=r"method must be one of .* or a callable.*got int"):
        RankingLoss(3)  # type: ignore[arg-type]
    with pytest.raises(errors.ArgumentTypeError, match=r"\['temperature'\] belong to a method given by name.*partial"):
        RankingLoss(lambda s: s, temperature=0.1)
    with pytest.raises(
        errors.ArgumentTypeError, match=r"arguments of 'neural_sort': temperature, e\.g\. 0\.1; got none"
    ):
        RankingLoss("neural_sort")
    with pytest.raises(
        errors.ArgumentTypeError, match=r"arguments of 'soft_sort': temperature.*got steepness, temperature"
    ):
        RankingLoss("soft_sort", temperature=1.0, steepness=2.0)
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
    with pytest.raises(errors.ArgumentTypeError, match=r"mask must be a boolean tensor.*got torch.int64"):
        loss(scores, ranks, ranks)
    with pytest.raises(errors.ShapeError, match=r"mask must have the shape of the scores; got \(4,\) and \(3, 4\)"):
        loss(scores, ranks, torch.ones(4, dtype=torch.bool))
    with pytest.raises(errors.ArgumentTypeError, match=r"mask needs a method that knows list lengths"):
        RankingLoss(partial(neural_sort, temperature=1.0))(scores, ranks, ranks >= 0)
    with pytest.raises(errors.ShapeError, match=r"scores must have 5 elements.*got \(3, 4\).*SortingNetwork\(4\)"):
        RankingLoss(SortingNetwork(5))(scores, ranks)
    with pytest.raises(errors.ArgumentError, match=r"layout must be one of 'odd_even', 'bitonic'; got 'merge'"):
        RankingLoss("sorting_network", layout="merge")
    with pytest.raises(errors.ShapeError, match=r"n >= 1; got \(3, 0\)"):
        loss(scores[:, :0], ranks[:, :0])
    with pytest.raises(errors.ArgumentTypeError, match=r"scores must have a floating-point dtype; got torch.int64"):
        loss(ranks, ranks)
