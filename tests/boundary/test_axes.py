"""Which dimension of the outputs counts the samples, where the graph tells that it is not the first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from tests.boundary.explicit import Case, check, linear, of
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

import newton_plugin as npl
from newton_plugin._boundary.search import BoundarySearch

G = torch.Generator().manual_seed(0)
X = torch.randn(16, 5, generator=G, dtype=torch.float64)
IMAGES = torch.randn(16, 2, 4, 4, generator=G, dtype=torch.float64)
T = torch.arange(16) % 3
HEADS = 4


def of_heads_first(y: Tensor) -> Tensor:
    """A loss of each head and of their mean: y (K, N, C)."""
    y = y.flatten(3).sum(-1) if y.ndim > 3 else y
    each = torch.stack([F.cross_entropy(head, T) for head in y.unbind(0)])
    return each.mean() + F.cross_entropy(y.mean(0), T)


def parameter(*shape: int, seed: int = 1) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


def heads_first(y: Tensor, network: list[Tensor], outputs: Tensor | None = None) -> Case:
    """Outputs (K, N, C): the members are features."""
    outputs = y if outputs is None else outputs
    return Case(of_heads_first(y), outputs, of_heads_first, network, features=(0, *range(2, y.ndim)))


def heads() -> list[nn.Linear]:
    return [linear(seed=k) for k in range(HEADS)]


def ensemble(build: Callable[[], nn.Module], x: Tensor, out: int = 0) -> tuple[Tensor, list[Tensor]]:
    """A network for each member in one call."""
    torch.manual_seed(0)
    members = [build().double() for _ in range(HEADS)]
    stacked, _ = stack_module_state(members)
    parameters = {name: nn.Parameter(value.detach()) for name, value in stacked.items()}
    shell = copy.deepcopy(members[0]).to("meta")

    def call(parameters: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(shell, dict(parameters), (x,))

    return vmap(call, in_dims=(0, None), out_dims=out)(parameters, x), list(parameters.values())


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def batched(how: str) -> Case:
    w, b = parameter(HEADS, 5, 3), parameter(HEADS, 1, 3, seed=2)
    y = {
        "bmm": lambda: torch.bmm(X.expand(HEADS, 16, 5), w),
        "bmm and bias": lambda: torch.bmm(X.expand(HEADS, 16, 5), w) + b,
        "baddbmm": lambda: torch.baddbmm(b, X.expand(HEADS, 16, 5), w),
        "matmul": lambda: X @ w,
        "einsum": lambda: torch.einsum("nd,kdc->knc", X, w),
        "einsum and bias": lambda: torch.einsum("nd,kdc->knc", X, w) + b,
        "the weight on the left": lambda: (w.mT @ X.T).mT,
    }[how]()
    return heads_first(y, [w, b] if "b" in how.split()[-1] and how not in ("bmm",) else [w])


def members_second(how: str) -> Case:
    w = parameter(HEADS, 5, 3)
    network: list[Tensor] = [w]
    if how == "vmap":
        y, network = ensemble(perceptron, X, 1)
    elif how == "stack":
        members = heads()
        y, network = torch.stack([head(X) for head in members], 1), of(*members)
    elif how == "stack and transpose":
        members = heads()
        y, network = torch.stack([head(X) for head in members]).transpose(0, 1), of(*members)
    else:
        y = torch.einsum("nd,kdc->nkc", X, w)

    def loss(y: Tensor) -> Tensor:
        return of_heads_first(y.transpose(0, 1))

    return Case(loss(y), y, loss, network)


def stacked_first(after: str) -> Case:
    members = heads()
    y = torch.stack([head(X) for head in members])
    if after == "flattened":
        flat, labels = y.reshape(-1, 3), T.repeat(HEADS)
        return Case(F.cross_entropy(flat, labels), flat, lambda y: F.cross_entropy(y, labels), of(*members))
    if after == "features of one":
        y = torch.stack([head(X)[:, :1].squeeze(1) for head in members])
    return heads_first(y, of(*members))


def convolutions() -> Case:
    y, network = ensemble(lambda: nn.Conv2d(2, 3, 3), IMAGES)
    return heads_first(y, network)


def temporal(batched: bool, first: bool) -> Case:
    """Connectionist temporal classification wants (T, N, C), or (T, C)."""
    net = linear(5, 4)
    x = torch.randn(*((9, 6, 5) if first else (6, 9, 5)) if batched else (9, 5), generator=G, dtype=torch.float64)
    targets = torch.randint(1, 4, (6, 3) if batched else (3,), generator=G)
    lengths = (torch.full((6,), 9), torch.full((6,), 3)) if batched else (torch.tensor(9), torch.tensor(3))
    y = net(x)

    def loss(y: Tensor) -> Tensor:
        y = y if first or not batched else y.transpose(0, 1)
        return F.ctc_loss(y.log_softmax(-1), targets, *lengths)

    features = None if batched and not first else (0, 2) if batched else (0, 1)
    return Case(loss(y), y, loss, of(net), features=features)


def unbatched(how: str) -> Case:
    net = linear(bias=how != "no bias")
    y = net(X[0])

    def loss(y: Tensor) -> Tensor:
        if how == "negative log-likelihood":
            return F.nll_loss(y.log_softmax(-1), T[1])
        return F.huber_loss(y, X[0, :3]) if how == "huber" else F.cross_entropy(y, T[1])

    return Case(loss(y), y, loss, of(net), features=(0,))


def recurrent(kind: type[nn.RNNBase], batch_first: bool, both: bool) -> Case:
    torch.manual_seed(0)
    net = kind(5, 3, num_layers=2, batch_first=batch_first, bidirectional=both).double()
    x = torch.randn(*((16, 4) if batch_first else (4, 16)), 5, generator=G, dtype=torch.float64)
    y = net(x)[0]
    target = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss(y: Tensor) -> Tensor:
        return F.huber_loss(y, target)

    return Case(loss(y), y, loss, of(net), features=(1, 2) if batch_first else (0, 2))


def one_call_for_each(sample: Callable[[int], Tensor]) -> Case:
    net = linear()
    y = torch.stack([net(sample(k)) for k in range(16)]).reshape(16, 3)
    return Case(F.cross_entropy(y, T), y, lambda y: F.cross_entropy(y, T), of(net))


def lists_of_equal_length() -> Case:
    """One call for each list: the calls are the samples."""
    net, lists = linear(5, 1), torch.randn(6, 4, 5, generator=G, dtype=torch.float64)
    y = torch.stack([net(items).squeeze(-1) for items in lists])

    def loss(y: Tensor) -> Tensor:
        return -(y.log_softmax(-1)[:, 0]).mean()

    return Case(loss(y), y, loss, of(net))


CASES: dict[str, Callable[[], Case]] = {
    "heads, stacked first": lambda: stacked_first("nothing"),
    "heads, stacked first and flattened": lambda: stacked_first("flattened"),
    **{f"members second: {how}": lambda how=how: members_second(how) for how in ("stack", "vmap", "einsum")},
    "heads, stacked first and transposed": lambda: members_second("stack and transpose"),
    "vmap of a perceptron": lambda: heads_first(*ensemble(perceptron, X)),
    "vmap of a layer": lambda: heads_first(*ensemble(lambda: nn.Linear(5, 3), X)),
    "vmap of a layer without bias": lambda: heads_first(*ensemble(lambda: nn.Linear(5, 3, bias=False), X)),
    "vmap of a convolution": convolutions,
    **{
        how: lambda how=how: batched(how)
        for how in (
            *("bmm", "bmm and bias", "baddbmm", "matmul", "einsum", "einsum and bias", "the weight on the left"),
        )
    },
    **{
        f"{kind.__name__}, {'samples' if first else 'time'} first{', both directions' if both else ''}": (
            lambda kind=kind, first=first, both=both: recurrent(kind, first, both)
        )
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
        for first in (True, False)
        for both in (True, False)
    },
    "CTC, time first": lambda: temporal(True, True),
    "CTC, samples first": lambda: temporal(True, False),
    "CTC of one sample": lambda: temporal(False, True),
    **{
        f"one sample: {how}": lambda how=how: unbatched(how)
        for how in ("cross-entropy", "no bias", "negative log-likelihood", "huber")
    },
    "one call for each sample": lambda: one_call_for_each(lambda k: X[k]),
    "one call for each sample, a batch of one": lambda: one_call_for_each(lambda k: X[k : k + 1]),
    "lists of equal length": lists_of_equal_length,
}


@pytest.mark.parametrize("name", CASES)
def test_samples_are_counted_where_they_are(name: str) -> None:
    case = CASES[name]()
    check(case)
    cut = BoundarySearch("auto")(case.loss)
    assert cut.beside == []
    assert len(cut.boundaries) == 1


def test_stacked_first_is_stacked_second() -> None:
    """The same gradient, whichever dimension counts the heads."""
    first, second = (
        torch.autograd.grad(npl.LossHook()(case.loss), case.network)
        for case in (stacked_first("nothing"), members_second("stack"))
    )
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_fused_kernels_agree_with_those_that_are_seen_through(kind: type, both: bool, batch_first: bool) -> None:
    """In float32, oneDNN has one kernel for a layer."""
    shapes = []
    for dtype in (torch.float32, torch.float64):
        net = kind(5, 3, num_layers=2, batch_first=batch_first, bidirectional=both).to(dtype)
        cut = BoundarySearch("auto")(net(torch.randn(16, 4, 5, dtype=dtype))[0].cosh().mean())
        shapes.append([(b.shape, b.features) for b in cut.boundaries])
    assert shapes[0] == shapes[1] == [((16, 4, 6 if both else 3), None if batch_first else (0, 2))]


@pytest.mark.parametrize("name", ["Transpose", "Permute", "Stack", "Cat", "Split", "Sum", "View", "Index"])
def test_a_function_of_the_user_may_have_the_name_of_an_operation(name: str) -> None:
    def forward(ctx: object, y: Tensor) -> Tensor:
        return y.clone()

    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    function = type(name, (torch.autograd.Function,), members)
    first, second = linear(), linear(3, 3)
    for h in (first(X), second(first(X))):
        cut = BoundarySearch("auto")(F.cross_entropy(function.apply(h), T))  # type: ignore[attr-defined]
        assert [b.shape for b in cut.boundaries] == [(16, 3)]
    h = first(X)
    cut = BoundarySearch("auto")(F.cross_entropy(function.apply(h * second(h)), T))  # type: ignore[attr-defined]
    assert [b.shape for b in cut.boundaries] == [(16, 3)]
