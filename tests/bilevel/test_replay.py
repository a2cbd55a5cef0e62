"""Evaluating again: the same random numbers, and buffers that move once a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from newton_plugin.bilevel import BOREP, MASOBA, AccBO, StocBiO, hypergradient
from newton_plugin.bilevel._hypergradient.replay import Replay

METHODS = [AccBO, MASOBA, BOREP, StocBiO]


class Two:
    """One net at the lower level, seen by both losses through different BatchNorms."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Linear(3, 4)
            self.below, self.above = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
            self.z = torch.randn(10, 3)
        self.x = torch.full((10,), 0.2, requires_grad=True)
        self.seen = {"upper": 0, "lower": 0}

    @property
    def lower_params(self) -> list[Tensor]:
        return [*self.body.parameters(), *self.below.parameters()]

    def upper(self) -> Tensor:
        self.seen["upper"] += 1
        return self.above(self.body(self.z)).sin().square().sum() + self.below.weight.sum()

    def lower(self) -> Tensor:
        self.seen["lower"] += 1
        losses = (self.below(self.body(self.z)) - 1).square().sum(-1)
        return (self.x.sigmoid() * losses).mean() + 0.1 * sum(p.square().sum() for p in self.lower_params)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("hvp", ["autograd", "finite_difference"])
def test_batchnorm_advances_once_a_step(method: Any, hvp: str) -> None:
    problem = Two()
    optimizer = method([problem.x], problem.lower_params, lr_upper=0.01, lr_lower=0.01, hvp=hvp, terms=3)
    for step in range(1, 4):
        optimizer.step(problem.upper, problem.lower)
        assert int(problem.below.num_batches_tracked) == step
        assert int(problem.above.num_batches_tracked) == step
    if method is not MASOBA:
        assert problem.seen["lower"] > 3
    count = int(problem.below.num_batches_tracked)
    optimizer.warm_start(problem.lower, 4)  # four batches as far as anybody knows
    assert int(problem.below.num_batches_tracked) == count + 4


def test_the_one_advance_is_the_ordinary_one() -> None:
    problem, plain = Two(), Two()
    hypergradient(problem.upper, problem.lower, [problem.x], problem.lower_params, terms=3, hvp="finite_difference")
    mean = (plain.body(plain.z)).mean(0).detach()
    torch.testing.assert_close(problem.above.running_mean, 0.1 * mean)
    assert int(problem.below.num_batches_tracked) == 1
    assert problem.seen["lower"] > 1


def test_buffers_that_change_the_output_are_the_same_again() -> None:
    """Spectral norm iterates a vector in place at each call: the second call sees what the first left."""
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    z = torch.randn(5, 4)
    replay = Replay(list(layer.parameters()))
    replay.same("loss", lambda: layer(z).sum())
    kept = {k: b.clone() for k, b in layer.named_buffers()}
    first = replay.same("loss", lambda: layer(z).sum())
    second = replay.same("loss", lambda: layer(z).sum())
    assert torch.equal(first, second)
    assert all(torch.equal(b, kept[k]) for k, b in layer.named_buffers())
    layer(z)
    assert not all(torch.equal(b, kept[k]) for k, b in layer.named_buffers())


def test_the_graph_of_a_replayed_loss_is_whole() -> None:
    """BatchNorm in evaluation mode keeps its statistics for the backward: they must not change under it."""
    norm = nn.BatchNorm1d(3).eval()
    z = torch.randn(4, 3)
    replay = Replay([])
    for _ in range(2):
        loss = replay.same("loss", lambda: norm(z).square().sum())
    torch.autograd.grad(loss, list(norm.parameters()))


def test_the_random_stream_goes_on_after_the_first_evaluation() -> None:
    replay = Replay([])
    torch.manual_seed(5)
    expected = [torch.rand(3) for _ in range(3)]
    torch.manual_seed(5)
    draws = [replay.same("a", lambda: torch.rand(3)) for _ in range(3)]
    assert all(torch.equal(d, expected[0]) for d in draws)
    assert torch.equal(replay.same("b", lambda: torch.rand(3)), expected[1])
    assert torch.equal(replay.fresh("a", lambda: torch.rand(3)), expected[2])
    with pytest.raises(KeyError):
        replay.same("a", lambda: {}["nothing"])
    assert torch.equal(replay.same("a", lambda: torch.rand(3)), expected[0])


def test_modules_that_raise_get_their_buffers_back() -> None:
    norm = nn.BatchNorm1d(3)
    own = dict(norm._buffers)
    replay = Replay([])
    replay.fresh("a", lambda: norm(torch.zeros(2, 3)))
    with pytest.raises(ValueError, match="expected 2D or 3D"):
        replay.fresh("a", lambda: norm(torch.zeros(2, 3, 4, 5)))
    assert all(norm._buffers[k] is b for k, b in own.items())
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_a_compiled_lower_model_goes_by_finite_differences() -> None:
    """aot_autograd has no double backward; the graph-free path has no need of it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    compiled = torch.compile(net, backend="aot_eager")
    z, x = torch.randn(8, 3).double(), torch.zeros(8, dtype=torch.float64, requires_grad=True)

    def found(model: Any, hvp: Any) -> Tensor:
        def lower() -> Tensor:
            decay = sum(p.square().sum() for p in net.parameters())
            return (x.sigmoid() * model(z).squeeze(-1).square()).mean() + 0.1 * decay

        params = list(net.parameters())
        return hypergradient(lambda: model(z).sin().sum(), lower, [x], params, terms=3, hvp=hvp)[0]

    plain = found(net, "autograd")
    count = int(net[1].num_batches_tracked)
    torch.testing.assert_close(found(compiled, "finite_difference"), plain, rtol=1e-5, atol=1e-8)
    assert int(net[1].num_batches_tracked) == count + 2  # once for each loss


def test_a_recurrent_lower_model() -> None:
    torch.manual_seed(0)
    net = nn.LSTM(3, 4, batch_first=True).double()
    z, x = torch.randn(6, 5, 3).double(), torch.zeros(6, dtype=torch.float64, requires_grad=True)

    def lower() -> Tensor:
        losses = net(z)[0][:, -1].square().sum(-1)
        return (x.sigmoid() * losses).mean() + 0.1 * sum(p.square().sum() for p in net.parameters())

    ends = []
    for hvp in ("autograd", "finite_difference"):
        args = (lambda: net(z)[0].sin().sum(), lower, [x], net.parameters())
        ends.append(hypergradient(*args, terms=5, hvp=hvp)[0])
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-10)
