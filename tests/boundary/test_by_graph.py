"""boundary="auto": where the graph says that outputs meet the loss, for the shapes that models come in."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import newton_plugin as npl
from newton_plugin._boundary.by_graph import GraphFinder

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0, 1, 2, 0, 1, 2])


def shapes(loss: Tensor) -> list[tuple[int, ...]]:
    return sorted(b.shape for b in GraphFinder()(loss).boundaries)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)

    def forward(self, i: Tensor) -> Tensor:
        return self.embed(i) @ self.embed.weight.T


class Scaled(nn.Module):
    """A learned temperature on the logits, and a learned weight on the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * self.log_scale.exp()


def lstm(x: Tensor) -> Tensor:
    return nn.LSTM(4, 3, batch_first=True)(x[:, None].repeat(1, 5, 1))[0]


def conv(x: Tensor) -> Tensor:
    return nn.Conv2d(1, 2, 3)(x.reshape(-1, 1, 2, 2).repeat(1, 1, 3, 3))


def convolution_with_as_many_samples_as_channels(x: Tensor) -> Tensor:
    """Weight (6, 6, 1, 1) and output (6, 6, 1, 1) look alike; the output is data all the same."""
    return nn.Conv2d(6, 6, 1)(torch.ones(6, 6, 1, 1)).flatten(1)


SHAPES = {
    "linear": (lambda x: nn.Linear(4, 3)(x), [(6, 3)]),
    "no bias": (lambda x: nn.Linear(4, 3, bias=False)(x), [(6, 3)]),
    "square first layer": (lambda x: nn.Linear(4, 3)(nn.Linear(4, 6)(x)[:, :4]), [(6, 3)]),
    "as many samples as features": (lambda x: nn.Linear(6, 3)(torch.ones(6, 6)), [(6, 3)]),
    "as many samples as channels": (convolution_with_as_many_samples_as_channels, [(6, 6)]),
    "weight norm": (lambda x: weight_norm(nn.Linear(4, 3))(x), [(6, 3)]),
    "batch norm last": (lambda x: nn.BatchNorm1d(4)(nn.Linear(4, 4)(x)), [(6, 4)]),
    "layer norm last": (lambda x: nn.LayerNorm(4)(nn.Linear(4, 4)(x)), [(6, 4)]),
    "embedding": (lambda x: nn.Embedding(4, 3)(torch.arange(6) % 4), [(6, 3)]),
    "tied weights": (lambda x: Tied()(torch.arange(6) % 5), [(6, 5)]),
    "learned temperature": (lambda x: Scaled()(x), [(6, 3)]),
    "activation last": (lambda x: torch.relu(nn.Linear(4, 3)(x)), [(6, 3)]),
    "squeezed": (lambda x: nn.Linear(4, 1)(x).squeeze(-1), [(6,)]),
    "lists of items": (lambda x: nn.Linear(2, 1)(x.reshape(6, 2, 2)).squeeze(-1), [(6, 2)]),
    "flattened by the loss": (lambda x: nn.Linear(4, 3)(x[:, None]).view(-1, 3), [(6, 3)]),
    "stacked": (lambda x: torch.stack([nn.Linear(4, 1)(x).squeeze(-1) for _ in range(3)], 1), [(6, 3)]),
    "concatenated": (lambda x: torch.cat([nn.Linear(4, 2)(x), nn.Linear(4, 3)(x)], 1), [(6, 5)]),
    "LSTM": (lstm, [(6, 5, 3)]),
    "convolution": (conv, [(6, 2, 4, 4)]),
    "in place after the head": (lambda x: nn.Linear(4, 3)(x).relu_(), [(6, 3)]),
    "time first in the loss": (lambda x: nn.Linear(4, 3)(x[:, None].repeat(1, 5, 1)).transpose(0, 1), [(6, 5, 3)]),
    "frozen trunk": (lambda x: nn.Linear(4, 3)(nn.Linear(4, 4).requires_grad_(False)(x)), [(6, 3)]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_graph_finder_finds_the_outputs(name: str) -> None:
    forward, expected = SHAPES[name]
    torch.manual_seed(0)
    y = forward(X)
    assert shapes(y.exp().square().mean()) == expected


def test_parameters_of_the_loss_are_not_outputs() -> None:
    """A penalty, a learned loss weight, a regulariser towards an anchor: nothing but the head is a boundary."""
    model = Scaled()
    anchor = torch.randn(3, 4)
    y = model.head(X)
    weight = nn.Parameter(torch.zeros(()))
    loss = torch.exp(-weight) * F.cross_entropy(y, T) + weight
    loss = loss + 0.1 * (model.head.weight - anchor).square().sum() + 0.1 * (2 * model.head.weight).norm()
    assert shapes(loss) == [(6, 3)]
    model.zero_grad()
    npl.LossHook(damping=1e9)(loss)
    (plain,) = torch.autograd.grad(torch.exp(-weight) * F.cross_entropy(model.head(X), T) + weight, weight)
    loss.backward()
    assert torch.allclose(weight.grad, plain), "the weight of the loss keeps its own gradient"


def test_the_walk_is_linear_in_diamonds() -> None:
    """Residual sums in the loss, in the model and in a penalty: 2^200 paths, each node looked at once."""
    trunk, head = nn.Linear(4, 4), nn.Linear(4, 3)

    def diamonds(x: Tensor) -> Tensor:
        for _ in range(200):
            x = x + 0.1 * torch.sin(x)
        return x

    loss = diamonds(head(diamonds(trunk(X)))).square().mean() + diamonds(head.weight).square().sum()
    assert shapes(loss) == [(6, 3)]


def test_an_optimised_leaf_is_its_own_boundary() -> None:
    y = nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    npl.LossHook(curvature="hessian", damping=1e-9)((y - 5).square().sum(-1).mean()).backward()
    assert torch.allclose(y.grad * 2, y.detach() - 5, atol=1e-5)


def test_boundaries_are_named_after_their_layers() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3, bias=False))
    finder = GraphFinder()
    finder.attach(model)
    assert [b.name for b in finder(F.cross_entropy(model(X), T)).boundaries] == ["1"]


def test_transposed_features_are_reported_where_feature_dims_counts_them() -> None:
    """(N, T, V) logits turned for cross_entropy: -1 would mean T. A name settles it."""
    head, t = nn.Linear(4, 3), torch.randint(0, 3, (2, 5))
    x = torch.randn(2, 5, 4)
    with pytest.warns(UserWarning, match=r"from \(2, 5, 3\) to \(2, 3, 5\).*boundary='head'"):
        npl.LossHook(feature_dims=-1)(F.cross_entropy(head(x).mT, t))
    npl.LossHook()(F.cross_entropy(head(x).mT, t))  # all features of a sample: no question
    model = nn.Sequential(head)
    hook = npl.LossHook(feature_dims=-1, boundary="0", module=model)
    hook(F.cross_entropy(model(x).mT, t)).backward()
    assert [b.shape for b in hook._search(F.cross_entropy(model(x).mT, t)).boundaries] == [(2, 5, 3)]
