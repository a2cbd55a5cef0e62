"""A mask makes a list shorter: each list has the value and the derivatives that it has alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from newton_plugin.algorithms import (
    RankingLoss,
    SortingNetwork,
    average_precision_loss,
    ndcg_loss,
    neural_sort,
    soft_rank,
    soft_top_k,
    spearman_loss,
)
from newton_plugin.algorithms._sorting.methods import matrix, resolve

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "neural_sort": ("neural_sort", {"temperature": 0.7}),
    "soft_sort": ("soft_sort", {"temperature": 0.7}),
    "soft_sort squared": ("soft_sort", {"temperature": 0.7, "p": 2}),
    "odd-even": ("sorting_network", {"steepness": 2.0}),
    "bitonic": ("sorting_network", {"steepness": 2.0, "layout": "bitonic", "swap": "cauchy"}),
}
every_method = pytest.mark.parametrize("method", METHODS)
Loss = Callable[..., Tensor]


def ranking_loss(scores: Tensor, ranks: Tensor, method: Any, *, mask: Tensor | None = None, **options: Any) -> Tensor:
    return RankingLoss(method, **options)(scores, ranks, mask)


LOSSES: dict[str, Loss] = {
    "ndcg": ndcg_loss,
    "ndcg at 2": lambda s, y, method, **options: ndcg_loss(s, y, method, k=min(2, s.shape[-1]), **options),
    "linear ndcg": lambda s, y, method, **options: ndcg_loss(s, y, method, gain="linear", **options),
    "average precision": average_precision_loss,
    "spearman": spearman_loss,
    "ranking": ranking_loss,
}
every_loss = pytest.mark.parametrize("loss", LOSSES)


def _batch(loss: str, n: int = 6, padding: float = math.nan) -> tuple[Tensor, Tensor, Tensor]:
    """Lists of every length from 0 to n, their elements at random places; the rest holds anything."""
    generator = torch.Generator().manual_seed(n)
    mask = torch.zeros(n + 2, n, dtype=torch.bool)
    for row, length in enumerate([*range(n + 1), n - 1]):
        mask[row, torch.randperm(n, generator=generator)[:length]] = True
    scores = torch.randn(n + 2, n, generator=generator, dtype=torch.float64).masked_fill(~mask, padding)
    scores[-1, mask[-1].nonzero()[:2]] = 0.25  # a tie
    top = 2 if loss == "average precision" else 4
    given = torch.randint(0, top, (n + 2, n), generator=generator).masked_fill(~mask, -100)
    return scores, given, mask


@every_loss
@every_method
@pytest.mark.parametrize("n", [1, 2, 5, 6, 8])
def test_a_masked_list_is_a_shorter_list(loss: str, method: str, n: int) -> None:
    scores, given, mask = _batch(loss, n)
    chosen, options = METHODS[method]
    scores.requires_grad_()
    together = LOSSES[loss](scores, given, chosen, mask=mask, **options)
    (gradient,) = torch.autograd.grad(together, scores, create_graph=True)
    values = []
    for row in range(n + 2):
        own = mask[row]
        if not own.any():
            values.append(together.new_zeros(()))
            assert torch.equal(gradient[row].detach(), torch.zeros(n, dtype=torch.float64))
            continue
        alone = scores[row, own].detach().requires_grad_()
        value = LOSSES[loss](alone, given[row, own], chosen, **options)
        (g,) = torch.autograd.grad(value, alone)
        values.append(value.detach())
        torch.testing.assert_close(gradient[row, own].detach() * (n + 2), g, rtol=1e-12, atol=1e-12)
        assert torch.equal(gradient[row, ~own].detach(), torch.zeros(int((~own).sum()), dtype=torch.float64))
    torch.testing.assert_close(together.detach(), torch.stack(values).mean(), rtol=1e-12, atol=1e-12)
    assert together > 0 or n == 1


@every_loss
@every_method
def test_second_derivatives_too(loss: str, method: str) -> None:
    scores, given, mask = _batch(loss, 5, padding=1e6)
    chosen, options = METHODS[method]
    row = 4  # four elements of five
    own = mask[row]

    def masked(s: Tensor) -> Tensor:
        return LOSSES[loss](s, given[row], chosen, mask=own, **options)

    def short(s: Tensor) -> Tensor:
        return LOSSES[loss](s, given[row, own], chosen, **options)

    hessian = torch.autograd.functional.hessian(masked, scores[row])
    alone = torch.autograd.functional.hessian(short, scores[row, own])
    torch.testing.assert_close(hessian[own][:, own], alone, rtol=1e-10, atol=1e-12)
    assert hessian[~own].count_nonzero() == hessian[:, ~own].count_nonzero() == 0


@every_loss
@every_method
def test_a_full_mask_changes_nothing(loss: str, method: str) -> None:
    scores, given, _ = _batch(loss, 6, padding=0.0)
    scores, given = scores[-2:], given[-2:].clamp(min=0)
    chosen, options = METHODS[method]
    mask = torch.ones_like(given, dtype=torch.bool)
    full = LOSSES[loss](scores, given, chosen, mask=mask, **options)
    torch.testing.assert_close(full, LOSSES[loss](scores, given, chosen, **options), rtol=1e-12, atol=1e-13)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_in_lower_precision(loss: str, dtype: torch.dtype) -> None:
    scores, given, mask = _batch(loss, 6, padding=math.inf)
    low = scores.to(dtype)
    for chosen, options in METHODS.values():
        x = low.clone().requires_grad_()
        value = LOSSES[loss](x, given, chosen, mask=mask, **options)
        assert value.dtype == torch.float32
        expected = LOSSES[loss](low.double(), given, chosen, mask=mask, **options)
        torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
        (g,) = torch.autograd.grad(value, x)
        assert g.dtype == dtype
        assert g.isfinite().all()


@every_method
@pytest.mark.parametrize("shape", [(7,), (2, 3, 7)])
def test_rows_of_p_with_any_batch_shape(method: str, shape: tuple[int, ...]) -> None:
    """``matrix(..., lengths)``: the list's own P in the corner, zeros around it."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(shape, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 8, shape[:-1], generator=generator)
    chosen, options = METHODS[method]
    built = resolve(chosen, options)
    for k in (None, 3):
        p = matrix(built, scores, k, lengths)
        for s, q, m in zip(
            scores.reshape(-1, 7), p.reshape(-1, *p.shape[-2:]), lengths.reshape(-1).tolist(), strict=True
        ):
            rows = m if k is None else min(m, k)
            alone = matrix(built, s[:m], rows)
            torch.testing.assert_close(q[:rows, :m], alone, rtol=1e-12, atol=1e-13)
            assert q[rows:].count_nonzero() == q[:, m:].count_nonzero() == 0


def test_a_network_given_as_an_object_takes_a_mask() -> None:
    scores, given, mask = _batch("ndcg", 6)
    network = SortingNetwork(6, steepness=2.0)
    for loss in (ndcg_loss, spearman_loss):
        by_name = loss(scores, given, "sorting_network", mask=mask, steepness=2.0)
        assert torch.equal(loss(scores, given, network, mask=mask), by_name)


def test_an_object_that_gives_logarithms_alone_takes_a_mask() -> None:
    class OnlyLogarithms:
        def log_probabilities(self, scores: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return resolve("neural_sort", {"temperature": 0.7}).log_probabilities(scores, lengths)

    scores, given, mask = _batch("ndcg", 6)
    for loss in (ndcg_loss, spearman_loss, average_precision_loss):
        good = given.clamp(max=1)
        ours = loss(scores, good, "neural_sort", mask=mask, temperature=0.7)
        torch.testing.assert_close(loss(scores, good, OnlyLogarithms(), mask=mask), ours, rtol=1e-12, atol=1e-13)


@every_loss
def test_masks_under_vmap_and_the_compiler(loss: str) -> None:
    scores, given, mask = _batch(loss, 5, padding=0.0)

    def of(s: Tensor, y: Tensor, m: Tensor) -> Tensor:
        return LOSSES[loss](s, y, "neural_sort", mask=m, temperature=0.7)

    each = torch.stack([of(*row) for row in zip(scores, given, mask, strict=True)])
    torch.testing.assert_close(torch.func.vmap(of)(scores, given, mask), each, rtol=1e-12, atol=1e-13)
    compiled = torch.compile(of, backend="eager")
    torch.testing.assert_close(compiled(scores, given, mask), of(scores, given, mask), rtol=1e-12, atol=1e-13)
    torch.compiler.reset()


def test_the_functions_without_a_mask_say_so() -> None:
    scores, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for call in (soft_rank, lambda s, **options: soft_top_k(s, 1, **options)):
        with pytest.raises(TypeError, match=r"keyword arguments of 'neural_sort': temperature.*got mask, temperature"):
            call(scores, mask=mask, temperature=0.1)
    with pytest.raises(TypeError):
        neural_sort(scores, 0.1, mask=mask)  # type: ignore[call-arg]
