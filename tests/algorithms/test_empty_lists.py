"""Batches without lists, and lists of one element: no raw error, and the gradient that belongs to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from newton_plugin import ShapeError
from newton_plugin.algorithms import (
    RankingLoss,
    SortingNetwork,
    average_precision_loss,
    ndcg_loss,
    relaxed_bellman_ford,
    soft_rank,
    soft_top_k,
    spearman_loss,
)

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "neural_sort": ("neural_sort", {"temperature": 0.7}),
    "soft_sort": ("soft_sort", {"temperature": 0.7}),
    "odd-even": ("sorting_network", {}),
    "bitonic": ("sorting_network", {"layout": "bitonic"}),
}
every_method = pytest.mark.parametrize("method", METHODS)


def _all(method: str, masked: bool) -> dict[str, Any]:
    chosen, options = METHODS[method]

    def given(s: Tensor) -> tuple[Tensor, dict[str, Any]]:
        mask = {"mask": torch.ones(s.shape, dtype=torch.bool)} if masked else {}
        return torch.zeros(s.shape, dtype=torch.long), {**options, **mask}

    def ranking(s: Tensor) -> Tensor:
        mask = torch.ones(s.shape, dtype=torch.bool) if masked else None
        return RankingLoss(chosen, **options)(s, given(s)[0], mask)

    def of(loss: Any) -> Any:
        return lambda s: loss(s, given(s)[0], chosen, **given(s)[1])

    losses = {
        name: of(loss)
        for name, loss in (("ndcg", ndcg_loss), ("ap", average_precision_loss), ("spearman", spearman_loss))
    }
    return losses | {
        "ranking": ranking,
        "soft_rank": lambda s: soft_rank(s, chosen, **options).sum(),
        "soft_top_k": lambda s: soft_top_k(s, 1, chosen, **options).sum(),
    }


@every_method
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(0, 1), (0, 2), (0, 5), (0, 70), (2, 0, 3)])
def test_a_batch_without_lists(method: str, masked: bool, shape: tuple[int, ...]) -> None:
    """As with PyTorch's losses, the mean over nothing is NaN, and the gradient is as empty as the scores."""
    for name, f in _all(method, masked).items():
        x = torch.zeros(shape, requires_grad=True)
        value = f(x)
        assert value.isnan() if name not in ("soft_rank", "soft_top_k") else value == 0
        (g,) = torch.autograd.grad(value, x, create_graph=True)
        assert g.shape == shape
        if g.requires_grad:
            torch.autograd.grad(g.sum(), x)
        assert torch.func.grad(f)(x.detach()).shape == shape


@every_method
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 2, 1)])
def test_lists_of_one_element_have_the_gradient_zero(method: str, masked: bool, shape: tuple[int, ...]) -> None:
    for name, f in _all(method, masked).items():
        x = torch.linspace(-1, 1, len(shape) * 2)[: torch.Size(shape).numel()].reshape(shape).requires_grad_()
        value = f(x)
        assert value.item() == (torch.Size(shape).numel() if name == "soft_top_k" else 0)
        assert torch.equal(torch.autograd.grad(value, x)[0], torch.zeros(shape))


@pytest.mark.parametrize("layout", ["odd_even", "bitonic"])
@pytest.mark.parametrize("n", [1, 3, 4, 70])
@pytest.mark.parametrize("call", ["forward", "sort", "ranks", "log_probabilities"])
def test_networks_without_lists(layout: str, n: int, call: str) -> None:
    method = getattr(SortingNetwork(n, layout), call)
    for shape in ((0, n), (2, 0, n)):
        x = torch.zeros(shape, requires_grad=True)
        out = method(x)
        total = sum(t.sum() for t in (out if isinstance(out, tuple) else (out,)))
        assert torch.autograd.grad(total, x)[0].shape == shape
    assert torch.func.vmap(lambda s: method(s), in_dims=1)(torch.zeros(0, 2, n)) is not None


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("call", ["forward", "sort", "ranks", "log_probabilities"])
def test_every_output_of_a_network_has_a_graph(n: int, call: str) -> None:
    out = getattr(SortingNetwork(n), call)(torch.zeros(2, n, requires_grad=True))
    assert all(t.requires_grad for t in (out if isinstance(out, tuple) else (out,)))


@every_method
def test_lists_without_elements_are_refused(method: str) -> None:
    for f in _all(method, masked=False).values():
        with pytest.raises(ShapeError, match=r"n >= 1; got \(3, 0\)"):
            f(torch.zeros(3, 0))


def test_no_maps() -> None:
    x = torch.zeros(0, 3, 4, requires_grad=True)
    assert torch.autograd.grad(relaxed_bellman_ford(x).sum(), x)[0].shape == (0, 3, 4)
