"""``Embedding(sparse=True)`` at either level: the same as with dense gradients, or the same named error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from newton_plugin.bilevel import BOREP, MASOBA, AccBO, DoubleBackwardError, StocBiO, hypergradient

METHODS = [AccBO, MASOBA, BOREP, StocBiO]
every_method = pytest.mark.parametrize("method", METHODS)
every_hvp = pytest.mark.parametrize("hvp", ["autograd", "finite_difference"])
Closure = Callable[[], Tensor]


class Ratings:
    """A linear model on embedded words; each sample has a weight at the upper level."""

    def __init__(self, sparse: bool, bag: bool = False) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            kind: Any = nn.EmbeddingBag if bag else nn.Embedding
            self.words = kind(6, 3, sparse=sparse, dtype=torch.float64, **({"mode": "sum"} if bag else {}))
            self.head = nn.Linear(3, 1, dtype=torch.float64)
        index = torch.tensor([0, 1, 1, 5])  # a word twice, and words that never occur
        self.index = index.unsqueeze(-1) if bag else index
        self.weights = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        self.target = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)

    @property
    def lower_params(self) -> list[Tensor]:
        return [*self.words.parameters(), *self.head.parameters()]

    def lower(self) -> Tensor:
        errors = (self.head(self.words(self.index)).flatten() - self.target).square()
        return (self.weights.sigmoid() * errors).mean() + 0.1 * sum(p.square().sum() for p in self.lower_params)

    def upper(self) -> Tensor:
        return (self.head(self.words(self.index)).flatten() - self.target.flip(0)).square().mean()

    def trained(self, method: Any, hvp: str) -> Tensor:
        optimizer = method([self.weights], self.lower_params, lr_upper=0.1, lr_lower=0.1, hvp=hvp)
        optimizer.warm_start(self.lower, 3)
        for _ in range(5):
            optimizer.step(self.upper, self.lower)
        return torch.cat([p.detach().flatten() for p in (self.weights, *self.lower_params)])


@every_method
@every_hvp
def test_training_is_that_with_dense_gradients(method: Any, hvp: str) -> None:
    sparse, dense = (Ratings(kind).trained(method, hvp) for kind in (True, False))
    torch.testing.assert_close(sparse, dense, rtol=1e-9, atol=1e-10)
    assert not torch.equal(sparse[:4], torch.zeros(4, dtype=torch.float64))


@pytest.mark.parametrize("solver", ["cg", "linear", "neumann"])
@every_hvp
def test_so_is_the_hypergradient(solver: Any, hvp: Any) -> None:
    found = []
    for kind in (True, False):
        at = Ratings(kind)
        optimizer = torch.optim.SGD(at.lower_params, lr=0.2)
        for _ in range(400):
            optimizer.zero_grad()
            at.lower().backward()
            optimizer.step()
        found += hypergradient(at.upper, at.lower, [at.weights], at.lower_params, solver=solver, hvp=hvp, tol=1e-6)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)
    assert found[0].abs().min() > 1e-4


@every_method
def test_an_embedding_bag_has_no_second_derivative(method: Any) -> None:
    for kind in (True, False):
        with pytest.raises(DoubleBackwardError, match='hvp="finite_difference"'):
            Ratings(kind, bag=True).trained(method, "autograd")
    bag, plain = (
        Ratings(True, bag=True).trained(method, "finite_difference"),
        Ratings(False).trained(method, "autograd"),
    )
    torch.testing.assert_close(bag, plain, rtol=1e-6, atol=1e-7)


@every_method
def test_embeddings_at_the_upper_level(method: Any) -> None:
    """A weight for each word, learned."""

    def trained(sparse: bool) -> Tensor:
        weights = nn.Embedding(6, 1, sparse=sparse, dtype=torch.float64)
        with torch.no_grad():
            weights.weight.zero_()
        at = Ratings(False)

        def lower() -> Tensor:
            errors = (at.head(at.words(at.index)).flatten() - at.target).square()
            decay = 0.1 * sum(p.square().sum() for p in at.lower_params)
            return (weights(at.index).flatten().sigmoid() * errors).mean() + decay

        def upper() -> Tensor:
            return at.upper() + 1e-2 * weights(at.index).square().mean()

        optimizer = method(weights.parameters(), at.lower_params, lr_upper=0.1, lr_lower=0.1)
        for _ in range(5):
            optimizer.step(upper, lower)
        return weights.weight.detach()

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-10, atol=1e-12)
