"""Several names together, and boundaries that are not free because the loss already takes a step on their path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin._boundary.by_graph import GraphFinder
from newton_plugin._boundary.finder import free_boundaries
from newton_plugin._boundary.search import BoundarySearch

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class TwoHeads(nn.Module):
    """Two heads, the second with a layer above it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(4, 3)
        self.hidden = nn.Linear(4, 5)
        self.two = nn.Linear(5, 2)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.two(self.hidden(x).tanh())

    def loss(self, x: Tensor) -> Tensor:
        one, two = self(x)
        return one.cosh().sum(-1).mean() + two.cosh().sum(-1).mean()


def gradients(model: TwoHeads, *boundaries: str | list[str]) -> list[Tensor]:
    """Gradients of all parameters where one hook for each of ``boundaries`` is applied to one loss."""
    hooks = [npl.LossHook(damping=0.1, boundary=boundary, module=model) for boundary in boundaries]
    model.zero_grad()
    loss = model.loss(X)
    for hook in hooks:
        loss = hook(loss)
    loss.backward()
    for hook in hooks:
        hook.detach()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("boundaries", "same_as"),
    [
        (("one", ["one", "two"]), (["one", "two"],)),  # "one" is not free any more, "two" is
        (("two", "one"), (["one", "two"],)),
        (("two", "hidden"), ("two",)),  # "hidden" lies behind "two"
        (("hidden", "two"), ("hidden",)),
        (("one", "auto"), ("one",)),  # without a name, a loss that takes a step is left alone
        (("auto", "one"), ("auto",)),
    ],
)
def test_no_two_steps_on_one_path(
    boundaries: tuple[str | list[str], ...], same_as: tuple[str | list[str], ...]
) -> None:
    model = TwoHeads()
    ours, theirs = gradients(model, *boundaries), gradients(model, *same_as)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert worst(ours, gradients(model)) > 1e-3, "a step was taken"


def test_all_boundaries_of_a_plain_loss_are_free() -> None:
    loss = TwoHeads().loss(X)
    boundaries = GraphFinder()(loss).boundaries
    assert sorted(b.shape for b in free_boundaries(loss, boundaries)) == [(6, 2), (6, 3)]
    assert free_boundaries(npl.LossHook()(loss), boundaries) == []


def test_a_boundary_of_two_names_is_one() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 3))).double()
    search = BoundarySearch(["0", "0.0"])
    search.attach(model)
    assert [b.shape for b in search(model(X).square().mean()).boundaries] == [(6, 3)]
    search.detach()
    with pytest.raises(npl.ArgumentError, match="which the hook does not know"):
        search(model(X).square().mean())
