"""Outputs computed from one another, each with a path of its own to the loss: the step is taken where the paths meet.

Where they meet in a sum of terms, the tensor nearer the loss is stepped and the other one lies beside it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.boundary.explicit import Case, check, linear, of
from torch import Tensor, nn

from newton_plugin._boundary.beside import beside
from newton_plugin._boundary.search import BoundarySearch

G = torch.Generator().manual_seed(0)
X = torch.randn(16, 5, generator=G, dtype=torch.float64)
T, R = torch.arange(16) % 3, torch.randn(16, 3, generator=G, dtype=torch.float64)
BAGS = torch.randn(16, 4, 5, generator=G, dtype=torch.float64)
SERIES = torch.randn(16, 6, 5, generator=G, dtype=torch.float64)
SOURCES, TARGETS = torch.arange(48) * 7 % 16, torch.arange(48) % 16


def ce(y: Tensor) -> Tensor:
    return F.cross_entropy(y, T)


def graph_attention(aggregate: str) -> Case:
    """GATConv by hand: scores inside, values outside."""
    values, score = linear(5, 3, False), linear(6, 1, False)
    h = values(X)
    pairs = torch.cat([h[TARGETS], h[SOURCES]], -1)
    weights = F.leaky_relu(score(pairs)).exp()
    total = torch.zeros(16, 1, dtype=torch.float64).index_add(0, TARGETS, weights)
    messages = weights / total[TARGETS] * h[SOURCES]
    zeros = torch.zeros(16, 3, dtype=torch.float64)
    if aggregate == "index_add":
        y = zeros.index_add(0, TARGETS, messages)
    else:
        y = zeros.scatter_add(0, TARGETS[:, None].expand(48, 3), messages)
    return Case(ce(y), y, ce, of(values, score))


def graph_attention_of_heads() -> Case:
    """Several heads, whose mean gets a bias; a layer of the same kind below."""
    below, values, score = linear(5, 4), linear(4, 6, False), linear(6, 1, False)
    bias = nn.Parameter(torch.linspace(-1, 1, 3, dtype=torch.float64))
    h = values(F.elu(below(X))).view(16, 2, 3)
    weights = F.leaky_relu(score(torch.cat([h[TARGETS], h[SOURCES]], -1))).exp()
    total = torch.zeros(16, 2, 1, dtype=torch.float64).index_add(0, TARGETS, weights)
    messages = F.dropout(weights / total[TARGETS], 0.3) * h[SOURCES]
    y = torch.zeros(16, 2, 3, dtype=torch.float64).index_add(0, TARGETS, messages).mean(1) + bias

    def loss(y: Tensor) -> Tensor:
        return F.nll_loss(y.log_softmax(-1), T)

    return Case(loss(y), y, loss, [*of(below, values, score), bias])


def dense_attention() -> Case:
    """Queries and keys of the values themselves."""
    values, queries = linear(5, 3), linear(3, 3)
    h = values(X)
    y = (queries(h) @ h.T / math.sqrt(3)).softmax(-1) @ h
    return Case(ce(y), y, ce, of(values, queries))


def attention_pooling(how: str) -> Case:
    values, score = linear(5, 3), linear(3, 1)
    h = values(BAGS)
    weights = score(torch.tanh(h)).softmax(1)
    y = (weights * h).sum(1) if how == "sum" else (weights.mT @ h).squeeze(1)
    return Case(ce(y), y, ce, of(values, score))


def gate() -> Case:
    values, opening = linear(5, 3), linear(3, 3)
    h = values(X)
    y = h * torch.sigmoid(opening(h))
    return Case(ce(y), y, ce, of(values, opening))


def gated_critic() -> Case:
    """The loss is linear in the outputs, but they are a product: no sum of terms."""
    values, opening = linear(5, 1), linear(1, 1)
    h = values(X)
    y = h * torch.sigmoid(opening(h))
    return Case(-y.mean(), y, lambda y: -y.mean(), of(values, opening))


def highway() -> Case:
    below, transform, opening = linear(5, 3), linear(3, 3), linear(3, 3, seed=1)
    h = below(X)
    t = torch.sigmoid(opening(h))
    y = t * torch.relu(transform(h)) + (1 - t) * h
    return Case(ce(y), y, ce, of(below, transform, opening))


def dense_connection() -> Case:
    """The first part is activated on its way, so that the parts are not joined by sight."""
    first, second = linear(5, 3), linear(3, 2)
    h = first(X)
    y = torch.cat([torch.relu(h), second(h)], 1)
    target = torch.arange(16) % 5
    return Case(F.cross_entropy(y, target), y, lambda y: F.cross_entropy(y, target), of(first, second))


def plain_connection(how: str) -> Case:
    first, second = linear(5, 3), linear(3, 3)
    h = first(X)
    y = torch.cat([h, second(h)], 1) if how == "cat" else h + second(h)
    return Case(ce(y), y, ce, of(first, second))


def cell(kind: type[nn.RNNCellBase], every_step: bool) -> Case:
    torch.manual_seed(0)
    rnn = kind(5, 3).double()
    state, states = None, []
    for x in SERIES.unbind(1):
        state = rnn(x, state)
        states.append(state[0] if isinstance(state, tuple) else state)
    y = torch.stack(states, 1) if every_step else states[-1]
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def loss(y: Tensor) -> Tensor:
        return F.huber_loss(y, target)

    return Case(loss(y), y, loss, of(rnn))


def recurrent(kind: type[nn.RNNBase], every_step: bool) -> Case:
    torch.manual_seed(0)
    rnn = kind(5, 3, batch_first=True).double()
    y = rnn(SERIES)[0]
    y = y if every_step else y[:, -1]
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def loss(y: Tensor) -> Tensor:
        return F.huber_loss(y, target)

    return Case(loss(y), y, loss, of(rnn))


def two_graph_attentions() -> Case:
    """One of them hidden behind the other: the outputs of the last."""
    values, score, again, rescore = linear(5, 4), linear(4, 1), linear(4, 3), linear(3, 1)
    h = values(X)
    h = torch.tanh(score(h).softmax(0) * h)
    v = again(h)
    y = v * rescore(v).sigmoid()
    return Case(ce(y), y, ce, of(values, score, again, rescore))


def autoencoder(reduction: str) -> Case:
    encoder, decoder, noise = linear(5, 4), linear(2, 5), torch.randn(16, 2, generator=G, dtype=torch.float64)
    mean, log_variance = encoder(X).chunk(2, -1)
    y = decoder(mean + noise * (log_variance / 2).exp())
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)

    def of_outputs(y: Tensor) -> Tensor:
        return reconstruction(y).sum(1).mean() if reduction == "samples" else reconstruction(y).mean()

    def reconstruction(y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(y, torch.sigmoid(X), reduction="none")

    if reduction == "samples":
        return Case(
            (reconstruction(y).sum(1) + divergence.sum(1)).mean(),
            y,
            of_outputs,
            of(encoder, decoder),
            divergence.sum(1).mean(),
        )
    return Case(of_outputs(y) + divergence.mean(), y, of_outputs, of(encoder, decoder), divergence.mean())


def penalty_of_activations(weight: float) -> Case:
    first, second = linear(5, 4), linear(4, 3)
    h = first(X)
    y = second(torch.tanh(h))
    return Case(ce(y) + weight * h.square().mean(), y, ce, of(first, second), weight * h.square().mean())


MERGED: dict[str, Callable[[], Case]] = {
    "graph attention, index_add": lambda: graph_attention("index_add"),
    "graph attention, scatter_add": lambda: graph_attention("scatter_add"),
    "graph attention of several heads": graph_attention_of_heads,
    "attention among the samples": dense_attention,
    "attention pooling by a sum": lambda: attention_pooling("sum"),
    "attention pooling by a product": lambda: attention_pooling("product"),
    "gate": gate,
    "gate, linear loss": gated_critic,
    "highway": highway,
    "dense connection": dense_connection,
    "concatenated": lambda: plain_connection("cat"),
    "residual": lambda: plain_connection("sum"),
    "two gates, one above the other": two_graph_attentions,
    **{
        f"{kind.__name__}, {'every step' if every else 'the last step'}": lambda kind=kind, every=every: cell(
            kind, every
        )
        for kind in (nn.RNNCell, nn.GRUCell, nn.LSTMCell)
        for every in ((True, False) if kind is not nn.RNNCell else (True,))
    },
    **{
        f"{kind.__name__}, {'every step' if every else 'the last step'}": lambda kind=kind, every=every: recurrent(
            kind, every
        )
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
        for every in (True, False)
    },
}
TERMS: dict[str, Callable[[], Case]] = {
    "autoencoder, a mean of all": lambda: autoencoder("mean"),
    "autoencoder, a sum for each sample": lambda: autoencoder("samples"),
    "penalty of activations": lambda: penalty_of_activations(0.1),
}


@pytest.mark.parametrize("name", MERGED)
def test_the_step_is_taken_where_the_paths_meet(name: str) -> None:
    case = MERGED[name]()
    check(case)
    assert BoundarySearch("auto")(case.loss).beside == []


@pytest.mark.parametrize("name", TERMS)
def test_a_term_lies_beside_the_outputs(name: str) -> None:
    case = TERMS[name]()
    cut = BoundarySearch("auto")(case.loss)
    assert [b.shape for b in cut.boundaries] == [case.outputs.shape]
    assert len(cut.beside) == 1
    assert beside(case.loss.grad_fn, cut.boundaries), "the walk of a wrapped loss finds it, too"
    assert cut.left_out == []


def test_where_the_paths_meet_in_complex_numbers_nothing_is_stepped() -> None:
    first, second = linear(5, 3), linear(3, 3)
    h = first(X)
    cut = BoundarySearch("auto")((torch.fft.fft(h) * torch.fft.fft(second(h))).abs().square().mean())
    assert cut.boundaries == []
    assert len(cut.nested) == 1
    assert "torch.complex128" in cut.nested[0]


def derivative(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y.sum(), x, create_graph=True)[0]


def test_derivatives_of_a_network_are_boundaries_beside_its_values() -> None:
    """A physics-informed loss: neither values nor derivatives are computed from one another."""
    net = nn.Sequential(linear(1, 8), nn.Tanh(), linear(8, 1))
    x = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None].requires_grad_()
    u = net(x)
    curved = derivative(derivative(u, x), x)
    edge = net(torch.zeros(2, 1, dtype=torch.float64))
    cut = BoundarySearch("auto")((curved + u.sin()).square().mean() + edge.square().mean())
    assert sorted(b.shape for b in cut.boundaries) == [(2, 1), (20, 1), (20, 1)]
    assert cut.beside == cut.nested == cut.left_out == []
    layers = {b.shape: b.layer for b in cut.boundaries if b.layer is not None}
    assert layers[2, 1] == layers[20, 1], "two calls of the network; its derivative is no call"
    assert sum(b.layer is None for b in cut.boundaries) == 1


def test_a_gradient_penalty_is_a_boundary_beside_the_critics_values() -> None:
    critic = nn.Sequential(linear(5, 8), nn.Tanh(), linear(8, 1))
    between = X.clone().requires_grad_()
    penalty = (derivative(critic(between), between).norm(2, 1) - 1).square().mean()
    cut = BoundarySearch("auto")(critic(X.flip(0)).mean() - critic(X).mean() + 10 * penalty)
    assert sorted(b.shape for b in cut.boundaries) == [(16, 1), (16, 1), (16, 5)]
    assert cut.beside == cut.nested == cut.left_out == []


def test_derivatives_of_another_thread_are_numbered_from_zero() -> None:
    """As those of a device are: what was computed later has a lower number."""
    first, second = linear(5, 3), linear(3, 1)
    x = X.clone().requires_grad_()
    h = first(x)
    u = second(torch.tanh(h))
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(derivative(u, x)))
    thread.start()
    thread.join()
    slope = found[0]
    assert slope.grad_fn._sequence_nr() < h.grad_fn._sequence_nr()
    y = h * slope[:, :3]
    cut = BoundarySearch("auto")(ce(y))
    assert [b.edge.node for b in cut.boundaries] == [y.grad_fn]
    cut = BoundarySearch("auto")(slope.square().mean() + h.square().mean())
    assert [b.edge.node for b in cut.boundaries] == [slope.grad_fn]
    assert len(cut.beside) == 1


def test_an_attention_beside_another_head_of_its_values() -> None:
    """The outputs of the attention are no part of the other head, whose term is added."""
    values, score, other = linear(5, 3), linear(3, 1), linear(3, 2)
    h = values(X)
    y = h * score(h).sigmoid()
    cut = BoundarySearch("auto")(ce(y) + other(h).square().mean())
    assert sorted(b.shape for b in cut.boundaries) == [(16, 2), (16, 3)]
    assert cut.beside == []


def test_many_steps_of_a_recurrent_cell_take_no_cubic_time() -> None:
    cell = nn.GRUCell(5, 3)
    state = torch.zeros(4, 3)
    for _ in range(200):
        state = cell(torch.ones(4, 5), state)
    loss = state.square().mean()
    start = time.process_time()
    assert [b.shape for b in BoundarySearch("auto")(loss).boundaries] == [(4, 3)]
    assert time.process_time() - start < 2.0
