"""The terms of a loss are no outputs, whatever learned weights combine them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.boundary.explicit import Case, check, linear, of
from torch import Tensor, nn

from newton_plugin._boundary.search import BoundarySearch

G = torch.Generator().manual_seed(0)
X = torch.randn(16, 5, generator=G, dtype=torch.float64)
T = torch.arange(16) % 3


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


def network() -> nn.Module:
    return nn.Sequential(linear(5, 4), nn.Tanh(), linear(4, 3))


WEIGHTS = parameter(2)
MIXER = linear(2, 1)
DEEP = nn.Sequential(linear(2, 4), nn.ReLU(), linear(4, 1, seed=1), nn.Softplus())
COMBINED: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "a sum": lambda terms: torch.stack(terms).sum(),
    "a sum by a product": lambda terms: (WEIGHTS * torch.stack(terms)).sum(),
    "dot": lambda terms: torch.dot(WEIGHTS, torch.stack(terms)),
    "terms @ weights": lambda terms: torch.stack(terms) @ WEIGHTS,
    "weights @ terms": lambda terms: WEIGHTS @ torch.stack(terms),
    "a matrix and a sum": lambda terms: (torch.stack(terms) @ WEIGHTS.expand(3, 2).T).sum(),
    "a layer": lambda terms: MIXER(torch.stack(terms)).squeeze(),
    "a layer on a batch of one": lambda terms: MIXER(torch.stack(terms)[None]).mean(),
    "a network": lambda terms: DEEP(torch.stack(terms)).mean(),
    "concatenated": lambda terms: MIXER(torch.cat([term.reshape(1) for term in terms])).sum(),
}


@pytest.mark.parametrize("name", COMBINED)
def test_terms_are_not_stepped(name: str) -> None:
    net = network()
    y = net(X)

    def loss(y: Tensor) -> Tensor:
        return COMBINED[name]([F.cross_entropy(y, T), y.square().mean()])

    check(Case(loss(y), y, loss, of(net)))


def test_a_batch_of_one_is_no_term() -> None:
    net = network()
    y = net(X[:1])
    check(Case(F.cross_entropy(y, T[:1]), y, lambda y: F.cross_entropy(y, T[:1]), of(net)))
    net = nn.Sequential(linear(5, 4), nn.Tanh(), linear(4, 1))
    y = net(X[:1])
    assert [b.shape for b in BoundarySearch("auto")(y.square().mean()).boundaries] == [(1, 1)]


def test_a_number_beside_a_batch_is_a_term() -> None:
    trunk, head, of_the_mean = linear(5, 4), linear(4, 3), linear(4, 1)
    h = torch.tanh(trunk(X))
    cut = BoundarySearch("auto")(F.cross_entropy(head(h), T) + of_the_mean(h.mean(0)).square().sum())
    assert [b.shape for b in cut.boundaries] == [(16, 3)]
    assert cut.beside == ["Addmm (shape (1, 1))"]
