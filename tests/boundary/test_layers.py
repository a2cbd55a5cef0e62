"""Which tensor is stepped: where a layer ends, whatever parameters enter after it and however its weight was made.

Each case is held against the step that is taken explicitly at the outputs: the network gets that step, and the
parameters that belong to the loss keep their own gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import newton_plugin as npl
from newton_plugin._boundary.by_graph import GraphFinder

G = torch.Generator().manual_seed(0)
X, XS = (torch.randn(n, 5, generator=G, dtype=torch.float64) for n in (16, 7))
T, TS, R = torch.arange(16) % 3, torch.arange(7) % 3, torch.randn(16, 3, generator=G, dtype=torch.float64)
DAMPING = 0.1


class Case(NamedTuple):
    """A loss, the outputs at which it is to be stepped, the loss as a function of them, and who gets what."""

    loss: Tensor
    outputs: Sequence[Tensor]
    of_outputs: Callable[..., Tensor]
    network: Sequence[Tensor]
    of_the_loss: Sequence[Tensor] = ()


def ce(y: Tensor) -> Tensor:
    return F.cross_entropy(y, T)


def linear(rows: int = 5, columns: int = 3, bias: bool = True) -> nn.Linear:
    torch.manual_seed(rows + 10 * columns)
    return nn.Linear(rows, columns, bias=bias).double()


def parameter(*shape: int, scale: float = 1.0, seed: int = 1) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(scale * torch.randn(*shape, generator=generator, dtype=torch.float64))


def of(net: nn.Module) -> list[Tensor]:
    return list(net.parameters())


def uncertainty_weight(shape: tuple[int, ...]) -> Case:
    net, s = linear(), nn.Parameter(torch.full(shape, 0.2, dtype=torch.float64))
    y = net(X)
    loss = ((-s).exp() * ce(y) + s).reshape(())
    return Case(loss, [y], lambda y: math.exp(-0.2) * ce(y), of(net), [s])


def two_heads() -> Case:
    first, second, s = linear(), linear(5, 4), parameter(2)
    y, z = first(X), second(X)
    w = (-s).exp()

    def loss(y: Tensor, z: Tensor, w: Tensor) -> Tensor:
        return (w * torch.stack([ce(y), z.square().mean()])).sum()

    return Case(loss(y, z, w) + s.sum(), [y, z], lambda y, z: loss(y, z, w.detach()), of(first) + of(second), [s])


def log_std(by_distribution: bool) -> Case:
    net, log = linear(), parameter(3, scale=0.1)
    y = net(X)

    def loss(y: Tensor, log: Tensor) -> Tensor:
        if by_distribution:
            return -torch.distributions.Normal(y, log.exp()).log_prob(R).sum(-1).mean()
        return (log + 0.5 * ((R - y) / log.exp()).square()).sum(-1).mean()

    return Case(loss(y, log), [y], lambda y: loss(y, log.detach()), of(net), [log])


def temperature(first: bool) -> Case:
    net, scale = linear(), nn.Parameter(torch.tensor([1.7], dtype=torch.float64))
    y = net(X)
    loss = ce(scale * y) if first else ce(y / scale)
    return Case(loss, [y], lambda y: ce(1.7 * y if first else y / 1.7), of(net), [scale])


def logit_scale(place: str) -> Case:
    images, texts, log = (
        linear(5, 4, False),
        linear(5, 4, False),
        nn.Parameter(torch.full((1,), 0.7, dtype=torch.float64)),
    )
    a, b, s = images(X), texts(X.flip(0)), log.exp()
    logits = {"outside": lambda: s * (a @ b.T), "left": lambda: (s * a) @ b.T, "right": lambda: a @ (s * b).T}[place]()
    pairs = torch.arange(16)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(math.exp(0.7) * (a @ b.T), pairs)

    return Case(F.cross_entropy(logits, pairs), [a, b], loss, of(images) + of(texts), [log])


def random_field() -> Case:
    """A linear-chain conditional random field: scores of transitions and of the first tag are parameters."""
    net, transitions, start = linear(), parameter(3, 3, scale=0.3), parameter(3, scale=0.2)
    tags = torch.randint(0, 3, (8, 6), generator=torch.Generator().manual_seed(3))
    emissions = net(torch.randn(8, 6, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64))

    def loss(e: Tensor, transitions: Tensor, start: Tensor) -> Tensor:
        paths, score = start + e[:, 0], start[tags[:, 0]] + e[:, 0].gather(1, tags[:, :1]).squeeze(1)
        for k in range(1, 6):
            paths = torch.logsumexp(paths.unsqueeze(2) + transitions + e[:, k].unsqueeze(1), 1)
            score = score + transitions[tags[:, k - 1], tags[:, k]] + e[:, k].gather(1, tags[:, k : k + 1]).squeeze(1)
        return (torch.logsumexp(paths, 1) - score).mean()

    wanted = lambda e: loss(e, transitions.detach(), start.detach())  # noqa: E731
    return Case(loss(emissions, transitions, start), [emissions], wanted, of(net), [transitions, start])


def sample_weights() -> Case:
    net, w = linear(), parameter(16)
    y = net(X)

    def loss(y: Tensor, w: Tensor) -> Tensor:
        return (w.sigmoid() * F.cross_entropy(y, T, reduction="none")).mean()

    return Case(loss(y, w), [y], lambda y: loss(y, w.detach()), of(net), [w])


def reparametrized(wrap: Callable[[nn.Module], nn.Module], hidden: bool) -> Case:
    body, head = linear(5, 5), wrap(linear(5, 3, bias=False)).eval()
    y = head(torch.tanh(body(X)) if hidden else X)
    return Case(ce(y), [y], ce, of(head) + (of(body) if hidden else []))


def convolution() -> Case:
    torch.manual_seed(0)
    net = parametrizations.spectral_norm(nn.Conv1d(1, 3, 5, bias=False).double()).eval()
    y = net(X.unsqueeze(1)).squeeze(-1)
    return Case(ce(y), [y], ce, of(net))


def fast_weights(steps: int, bias: bool) -> Case:
    """Second-order MAML: weights that were trained inside the loss."""
    w, b = parameter(3, 5), parameter(3, seed=2)
    fast: list[Tensor] = [w, b] if bias else [w]
    for _ in range(steps):
        inner = F.cross_entropy(F.linear(XS, *fast), TS)
        gradients = torch.autograd.grad(inner, fast, create_graph=True)
        fast = [p - 0.5 * g for p, g in zip(fast, gradients, strict=True)]
    y = F.linear(X, *fast)
    return Case(ce(y), [y], ce, [w, b] if bias else [w])


def built_weight(how: str) -> Case:
    rows, columns = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 2, 3, 4])
    zeros = torch.zeros(3, 5, dtype=torch.float64)
    p = {"index": parameter(3, 5), "cat": parameter(2, 5)}.get(how, parameter(4))
    weight = {
        "index": lambda: p[torch.tensor([2, 0, 1])],
        "cat": lambda: torch.cat([p, zeros[:1]]),
        "index_put": lambda: zeros.index_put((rows, columns), p),
        "scatter": lambda: zeros.scatter(1, columns.expand(3, 4), p.expand(3, 4)),
    }[how]()
    y = X @ weight.T
    return Case(ce(y), [y], ce, [p])


def adapter(scale: float, frozen: bool) -> Case:
    base, a, b = linear(), parameter(5, 2), parameter(2, 3, seed=2)
    base.requires_grad_(not frozen)
    product = (X @ a) @ b
    y = base(X) + scale * product
    if frozen:  # the graph does not tell what a frozen layer made from any other constant, such as a target
        fixed = base(X)
        return Case(ce(y), [product], lambda p: ce(fixed + scale * p), [a, b])
    return Case(ce(y), [y], ce, [*of(base), a, b])


def residual() -> Case:
    first, second = linear(5, 3), linear(3, 3)
    hidden = first(X)
    y = hidden + second(torch.tanh(hidden))
    return Case(ce(y), [y], ce, of(first) + of(second))


def bias_of_its_own(of_users: bool) -> Case:
    w = parameter(5, 3)
    b = parameter(4, 3, seed=2) if of_users else parameter(3, seed=2)
    y = X @ w + (b[torch.arange(16) % 4] if of_users else b)
    return Case(ce(y), [y], ce, [w, b])


def checkpointed(reentrant: bool) -> Case:
    body, head = linear(5, 5), linear()
    y = checkpoint(head, torch.tanh(body(X)), use_reentrant=reentrant)
    return Case(ce(y), [y], ce, of(head) + of(body))


def elementwise_network() -> Case:
    w = parameter(3)
    y = X[:, :3] * w
    return Case(ce(y), [y], ce, [w])


def offset_of_each_sample() -> Case:
    """A parameter of the shape of the outputs is added to them: what comes out is no weight of a later product."""
    net, offset, other = linear(), parameter(16, 3), torch.randn(3, 3, generator=G, dtype=torch.float64)
    y = net(X) + offset

    def loss(y: Tensor) -> Tensor:
        return ce(F.normalize(y, dim=-1) @ other)

    return Case(loss(y), [y], loss, [*of(net), offset])


def two_calls_of_one_layer() -> Case:
    """Equal to one call with both batches."""
    net = linear()
    a, b = net(X), net(X.flip(0))

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return F.softplus(a + b).mean()

    return Case(loss(a, b), [torch.cat([a, b])], lambda y: loss(*y.chunk(2)), of(net))


def factorised() -> Case:
    users, items = parameter(9, 4), parameter(9, 4, seed=2)
    u, v = users[torch.arange(16) % 9], items[torch.arange(16) % 7]
    return Case(
        F.mse_loss((u * v).sum(-1), R[:, 0]), [u, v], lambda u, v: F.mse_loss((u * v).sum(-1), R[:, 0]), [users, items]
    )


CASES: dict[str, Callable[[], Case]] = {
    "uncertainty weight (1,)": lambda: uncertainty_weight((1,)),
    "uncertainty weight ()": lambda: uncertainty_weight(()),
    "uncertainty weights of two heads": two_heads,
    "log_std by hand": lambda: log_std(False),
    "log_std of a distribution": lambda: log_std(True),
    "temperature": lambda: temperature(False),
    "scale": lambda: temperature(True),
    "logit_scale outside": lambda: logit_scale("outside"),
    "logit_scale left": lambda: logit_scale("left"),
    "logit_scale right": lambda: logit_scale("right"),
    "conditional random field": random_field,
    "learned sample weights": sample_weights,
    "spectral_norm": lambda: reparametrized(parametrizations.spectral_norm, False),
    "spectral_norm, hidden layer": lambda: reparametrized(parametrizations.spectral_norm, True),
    "the older spectral_norm": lambda: reparametrized(nn.utils.spectral_norm, True),
    "orthogonal": lambda: reparametrized(parametrizations.orthogonal, False),
    "orthogonal, hidden layer": lambda: reparametrized(parametrizations.orthogonal, True),
    "weight_norm": lambda: reparametrized(parametrizations.weight_norm, True),
    "spectral_norm of a convolution": convolution,
    "fast weights": lambda: fast_weights(1, False),
    "fast weights and bias, three steps": lambda: fast_weights(3, True),
    **{f"weight by {how}": lambda how=how: built_weight(how) for how in ("index", "cat", "index_put", "scatter")},
    "LoRA": lambda: adapter(2.0, False),
    "LoRA, frozen base": lambda: adapter(2.0, True),
    "residual connection last": residual,
    "an offset of each sample": offset_of_each_sample,
    "two calls of one layer": two_calls_of_one_layer,
    "bias of its own": lambda: bias_of_its_own(False),
    "bias by user": lambda: bias_of_its_own(True),
    "checkpoint": lambda: checkpointed(False),
    "reentrant checkpoint": lambda: checkpointed(True),
    "a network without a product": elementwise_network,
    "factors picked by index": factorised,
}


@pytest.mark.parametrize("options", [{}, {"on_nonfinite": "raise"}], ids=["in the backward pass", "at once"])
@pytest.mark.parametrize("name", CASES)
def test_the_step_is_taken_where_the_layer_ends(name: str, options: dict[str, str]) -> None:
    case = CASES[name]()
    leaves = [y.detach() for y in case.outputs]

    def step_at(k: int) -> Tensor:
        def loss(y: Tensor) -> Tensor:
            return case.of_outputs(*leaves[:k], y, *leaves[k + 1 :])

        return npl.newton_step(loss, leaves[k], damping=DAMPING).step / len(leaves[k])

    everyone = [*case.network, *case.of_the_loss]
    if "reentrant" in name:  # torch allows it backward() alone
        case.outputs[0].backward(step_at(0), retain_graph=True)
        wanted = [p.grad.clone() for p in everyone if p.grad is not None]
        for p in everyone:
            p.grad = None
        npl.LossHook(damping=DAMPING, **options)(case.loss).backward()  # type: ignore[arg-type]
        got = [p.grad for p in everyone if p.grad is not None]
    else:
        steps = [step_at(k) for k in range(len(leaves))]
        wanted = list(torch.autograd.grad(case.outputs, case.network, steps, retain_graph=True))
        if case.of_the_loss:
            wanted += torch.autograd.grad(case.loss, case.of_the_loss, retain_graph=True)
        hooked = npl.LossHook(damping=DAMPING, **options)(case.loss)  # type: ignore[arg-type]
        got = list(torch.autograd.grad(hooked, everyone))
    assert len(got) == len(wanted) == len(everyone)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_data_as_wide_as_the_batch_is_no_base_of_a_weight() -> None:
    """Two towers without bias on data that needs no gradient: the products of an orthogonal weight and its base."""
    square = torch.randn(5, 5, generator=G, dtype=torch.float64)
    logits = (square @ parameter(5, 4)) @ (square @ parameter(5, 4, seed=2)).T
    assert [b.shape for b in GraphFinder()(F.cross_entropy(logits, torch.arange(5))).boundaries] == [(5, 4), (5, 4)]


def test_network_and_loss_in_one_opaque_operation_are_refused() -> None:
    body, head = linear(5, 5), linear()
    loss = checkpoint(lambda h: ce(head(h)), torch.tanh(body(X)), use_reentrant=True)
    with pytest.raises(npl.NoBoundaryError, match=r"CheckpointFunctionBackward.*use_reentrant=False"):
        npl.LossHook()(loss)

    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):  # type: ignore[no-untyped-def]
            ctx.layers = {"head": [head]}
            return ce(head(h))

        @staticmethod
        def backward(ctx, *grads):  # type: ignore[no-untyped-def]
            raise AssertionError("never run")

    with pytest.raises(npl.NoBoundaryError, match=r"HiddenBackward.*holds parameters"):
        npl.LossHook()(Hidden.apply(body(X)))


def test_a_function_without_parameters_is_a_part_of_the_loss() -> None:
    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):  # type: ignore[no-untyped-def]
            ctx.save_for_backward(y)
            ctx.reduce = lambda v: v.square().sum(-1)
            return ctx.reduce(y)

        @staticmethod
        def backward(ctx, *grads):  # type: ignore[no-untyped-def]
            return 2 * ctx.saved_tensors[0] * grads[0].unsqueeze(-1)

    cut = GraphFinder()(Squared.apply(linear()(X)).mean())
    assert [b.shape for b in cut.boundaries] == [(16, 3)]
    assert cut.hidden == []


def loss_in_a_script(h: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return ((h @ w).log_softmax(-1) * t).sum(-1)


# torch deprecates scripts; they are still in use.
scripts = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@scripts
def test_a_scripted_network_with_its_loss_is_refused() -> None:
    body, w, scripted_loss = linear(5, 5), parameter(5, 3), torch.jit.script(loss_in_a_script)
    for _ in range(4):  # the first runs profile
        loss = -scripted_loss(body(X), w, F.one_hot(T, 3).double()).mean()
    with pytest.raises(npl.NoBoundaryError, match="DifferentiableGraph"):
        npl.LossHook()(loss)


@scripts
def test_a_scripted_network_under_a_loss_is_stepped_at_its_outputs() -> None:
    net = torch.jit.script(nn.Sequential(linear(5, 5), nn.Tanh(), linear()))
    for _ in range(4):
        y = net(X)
    assert [b.shape for b in GraphFinder()(ce(y)).boundaries] == [(16, 3)]
