"""A loss and other terms may use the same operations. The step takes the place of the loss's gradient alone."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import newton_plugin as npl

G = torch.Generator().manual_seed(0)
X = torch.randn(16, 5, generator=G, dtype=torch.float64)
T = torch.arange(16) % 3
RULES: list[dict[str, Any]] = [
    {},
    {"damping": 0.1},
    {"curvature": "norm"},
    {"curvature": "hessian"},
    {"curvature": "hessian", "damping": 0.1, "structure": "per_sample"},
    {"on_nonfinite": "raise"},
]
Term = Callable[[Tensor], Tensor]


def nll(lp: Tensor) -> Tensor:
    return F.nll_loss(lp, T)


def sharp(lp: Tensor) -> Tensor:
    """Its Hessian has no closed form: products."""
    return lp.gather(1, T[:, None]).square().mean()


def entropy(lp: Tensor) -> Tensor:
    return (lp.exp() * lp).sum(-1).mean()


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, 3).to(dtype)


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def trained(terms: Callable[[Tensor], Tensor], steps: int = 6, scale: float = 1.0, dtype: Any = None) -> list[Tensor]:
    """The gradients of some steps of SGD."""
    net, found = model(dtype or torch.float64), []
    for _ in range(steps):
        net.zero_grad()
        (scale * terms(net(X.to(dtype or torch.float64)))).backward()
        found.append(flat(net))
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 / scale * p.grad  # type: ignore[operator]
    return found


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("scale", [1.0, 3.0, 65536.0])
@pytest.mark.parametrize("options", RULES, ids=str)
@pytest.mark.parametrize("loss", [nll, sharp], ids=lambda f: f.__name__)
def test_another_term_of_the_same_operations_keeps_its_gradient(
    loss: Term, options: dict[str, Any], scale: float
) -> None:
    def shared(y: Tensor, hook: npl.LossHook) -> Tensor:
        lp = y.log_softmax(-1)
        return hook(loss(lp)) + 5 * entropy(lp)

    def apart(y: Tensor, hook: npl.LossHook) -> Tensor:
        return hook(loss(y.log_softmax(-1))) + 5 * entropy(y.log_softmax(-1))

    found = []
    for terms in (shared, apart):
        hook = npl.LossHook(**options)
        found.append(trained(lambda y, terms=terms, hook=hook: terms(y, hook), scale=scale))
    assert worst(*found) <= 1e-9


@pytest.mark.parametrize("options", RULES, ids=str)
def test_two_hooked_losses_on_shared_operations(options: dict[str, Any]) -> None:
    def both(shared: bool) -> list[Tensor]:
        first, second = npl.LossHook(**options), npl.LossHook(**options)

        def terms(y: Tensor) -> Tensor:
            a = y.log_softmax(-1)
            b = a if shared else y.log_softmax(-1)
            return first(nll(a)) + 0.5 * second(entropy(b) + 2 * sharp(b))

        return trained(terms)

    assert worst(both(True), both(False)) <= 1e-9


@pytest.mark.parametrize("options", RULES[:3], ids=str)
def test_with_terms_beside_the_boundary(options: dict[str, Any]) -> None:
    def run(shared: bool) -> list[Tensor]:
        hook, s = npl.LossHook(**options), nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def terms(y: Tensor) -> Tensor:
            lp = y.log_softmax(-1)
            return hook((-s).exp() * nll(lp) + s.sum()) + 0.3 * entropy(lp if shared else y.log_softmax(-1))

        return [*trained(terms), s.grad]  # type: ignore[list-item]

    assert worst(run(True), run(False)) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision(dtype: torch.dtype) -> None:
    def run(shared: bool) -> list[Tensor]:
        hook = npl.LossHook()

        def terms(y: Tensor) -> Tensor:
            lp = y.log_softmax(-1)
            return hook(nll(lp)) + 5 * entropy(lp if shared else y.log_softmax(-1))

        return [g.double() for g in trained(terms, steps=3, dtype=dtype)]

    assert worst(run(True), run(False)) <= (1e-5 if dtype == torch.float32 else 0.05)


def test_a_term_that_comes_later_is_noticed_and_said() -> None:
    """Looks are at the steps 1 to 5, 8 and 9; the term comes at the sixth."""
    net, hook = model(), npl.LossHook()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 10):
            net.zero_grad()
            lp = net(X).log_softmax(-1)
            total = hook(nll(lp))
            if step >= 6:
                total = total + entropy(lp)
            total.backward()
            assert bool(caught) == (step >= 9)
    assert "another term of the backward pass uses operations of the hooked loss" in str(caught[0].message)
    theirs, reference = model(), npl.LossHook()
    reference.load_state_dict(hook.state_dict())
    theirs.zero_grad()
    (reference(nll(theirs(X).log_softmax(-1))) + entropy(theirs(X).log_softmax(-1))).backward()
    net.zero_grad()
    lp = net(X).log_softmax(-1)
    (hook(nll(lp)) + entropy(lp)).backward()
    assert worst([flat(net)], [flat(theirs)]) <= 1e-12


def test_nobody_shares_and_nothing_is_said() -> None:
    net, hook = model(), npl.LossHook()
    for _ in range(20):
        net.zero_grad()
        y = net(X)
        (hook(nll(y.log_softmax(-1))) + 0.1 * y.square().mean()).backward()  # y itself is below the boundary
    assert not any(sharing.found for sharing in hook._sharing.values())


def test_a_hook_on_the_outputs_fires_once_in_every_step() -> None:
    net, hook, seen = model(), npl.LossHook(), []
    for _ in range(4):
        y = net(X)
        y.register_hook(seen.append)
        hook(nll(y.log_softmax(-1))).backward()
    assert len(seen) == 4


def test_the_graph_is_freed() -> None:
    net, hook = model(), npl.LossHook()
    gc.collect()
    gc.disable()
    try:
        references = []
        for _ in range(5):
            y = net(X)
            lp = y.log_softmax(-1)
            references.append(weakref.ref(lp))
            (hook(nll(lp)) + entropy(lp)).backward()
            del y, lp
        assert all(reference() is None for reference in references)
    finally:
        gc.enable()


def test_under_autocast_nobody_is_taken_for_another_term() -> None:
    torch.manual_seed(0)
    net, hook = nn.Linear(5, 3), npl.LossHook()
    for _ in range(5):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = net(X.float()).float()
            loss = hook(nll((y @ torch.eye(3)).float().log_softmax(-1)))
        loss.backward()
    assert not any(sharing.found for sharing in hook._sharing.values())


def test_two_losses_in_turn_are_both_looked_at() -> None:
    """Two losses of one layer in every step; a term that shares operations with the first begins at the second step."""
    found = []
    for shared in (True, False):
        net, hook = model(), npl.LossHook(damping=0.1)
        for step in range(5):
            net.zero_grad()
            lp = net(X).log_softmax(-1)
            total = hook(nll(lp)) + hook(net(-X).square().mean())
            if step:
                total = total + 5 * entropy(lp if shared else net(X).log_softmax(-1))
            total.backward()
        found.append(flat(net))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scale", [0.1, 1 / 3])
def test_rounding_of_a_long_loss_is_not_taken_for_another_term(scale: float) -> None:
    torch.manual_seed(0)
    net, hook = nn.Linear(5, 8), npl.LossHook()
    for _ in range(5):
        a, b = (F.normalize(net(X.float() + 0.1 * torch.randn(16, 5)), dim=-1) for _ in range(2))
        logits = a @ b.T / 0.05
        (scale * hook((torch.logsumexp(logits, 1) - logits.diagonal()).mean())).backward()
    assert not any(sharing.found for sharing in hook._sharing.values())


def test_two_losses_that_one_operation_returns() -> None:
    def run(apart: bool) -> Tensor:
        net, first, second = model(), npl.LossHook(), npl.LossHook()
        y = net(X)
        losses = [F.cross_entropy(y, T), y.square().mean()]
        a, b = losses if apart else torch.stack(losses).unbind()
        (first(a) + second(b)).backward()
        return flat(net)

    torch.testing.assert_close(run(False), run(True), rtol=1e-12, atol=0)
    net, hook = model(), npl.LossHook()
    a, b = torch.stack([F.cross_entropy(net(X), T), net(-X).square().mean()]).unbind()
    hook(a)
    b.backward()
    assert bool(flat(net).any())


def test_a_backward_pass_that_failed_leaves_nothing_switched_on() -> None:
    net, hook = model(), npl.LossHook()
    y = net(X)
    lp = y.log_softmax(-1)
    loss = hook(nll(lp))
    handle = y.register_hook(lambda g: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    handle.remove()
    net.zero_grad()
    entropy(lp).backward()
    expected = model()
    entropy(expected(X).log_softmax(-1)).backward()
    torch.testing.assert_close(flat(net), flat(expected))
