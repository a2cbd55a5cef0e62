"""The door for a loss tensor, on live graphs: several backward passes, several losses, AMP, memory, state."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.twins import gradients_and_hessians, relative_error, step
from torch import Tensor, nn

import newton_plugin as npl

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 4, generator=GENERATOR, dtype=torch.float64)
T = torch.tensor([0, 1, 2, 0, 1, 2])


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters()])


def fisher_gradient(net: nn.Module, x: Tensor, t: Tensor, damping: float = 0.1) -> Tensor:
    y = net(x)
    g, h = gradients_and_hessians(lambda v: F.cross_entropy(v, t), y)
    grads = torch.autograd.grad(y, list(net.parameters()), step(g, h, "fisher", "mean", 1, damping) / len(x))
    return torch.cat([g.flatten() for g in grads])


def test_backward_may_run_twice() -> None:
    net = model()
    loss = npl.LossHook(damping=0.1)(F.cross_entropy(net(X), T))
    loss.backward(retain_graph=True)
    loss.backward()
    assert relative_error(flat(net), 2 * fisher_gradient(net, X, T)) <= 1e-12


def test_hooking_twice_is_harmless() -> None:
    net = model()
    loss = F.cross_entropy(net(X), T)
    first, second = npl.LossHook(damping=0.1), npl.LossHook(damping=0.1)
    for hook in (first, first, second):
        loss = hook(loss)
    loss.backward()
    assert relative_error(flat(net), fisher_gradient(net, X, T)) <= 1e-12


def test_a_wrapped_loss_is_not_preconditioned_twice() -> None:
    net = model()
    wrapped = npl.newton_loss(F.cross_entropy, damping=0.1)
    npl.LossHook(damping=0.1)(wrapped(net(X), T)).backward()
    assert relative_error(flat(net), fisher_gradient(net, X, T)) <= 1e-12


def test_a_partly_wrapped_loss_says_so() -> None:
    net = model()
    y = net(X)
    loss = npl.newton_loss(F.cross_entropy, damping=0.1)(y, T) + y.square().mean()
    with pytest.warns(UserWarning, match="already takes a Newton step of its own"):
        npl.LossHook(damping=0.1)(loss)
    loss.backward()
    (plain,) = [torch.cat([g.flatten() for g in torch.autograd.grad(net(X).square().mean(), list(net.parameters()))])]
    assert relative_error(flat(net), fisher_gradient(net, X, T) + plain) <= 1e-12


def test_two_losses_that_share_their_operations() -> None:
    """A hook acts in its own loss's backward only, also where both losses use the same log-softmax."""
    net = model()
    log_p = net(X).log_softmax(-1)
    hooked = npl.LossHook(damping=0.1)(F.nll_loss(log_p, T))
    other = -log_p.mean()
    hooked.backward(retain_graph=True)
    net.zero_grad()
    other.backward()
    plain = torch.autograd.grad(-net(X).log_softmax(-1).mean(), list(net.parameters()))
    assert torch.equal(flat(net), torch.cat([g.flatten() for g in plain]))


def test_what_else_reaches_the_outputs_is_untouched() -> None:
    """Hooking one term leaves the gradient of another term on the same outputs exactly as it is."""
    net = model()
    y = net(X)
    (npl.LossHook(damping=0.1)(F.cross_entropy(y, T)) + 0.5 * y.square().mean()).backward()
    plain = torch.autograd.grad(0.5 * net(X).square().mean(), list(net.parameters()))
    expected = fisher_gradient(net, X, T) + torch.cat([g.flatten() for g in plain])
    assert relative_error(flat(net), expected) <= 1e-12


def test_weights_after_the_hook_only_scale() -> None:
    net = model()
    (3 * npl.LossHook(damping=0.1)(F.cross_entropy(net(X), T)) / 7).backward()
    assert relative_error(flat(net), 3 / 7 * fisher_gradient(net, X, T)) <= 1e-12


def test_autograd_grad_sees_the_surrogate_too() -> None:
    net = model()
    loss = npl.LossHook(damping=0.1)(F.cross_entropy(net(X), T))
    grads = torch.autograd.grad(loss, list(net.parameters()))
    assert relative_error(torch.cat([g.flatten() for g in grads]), fisher_gradient(net, X, T)) <= 1e-12


def test_in_place_operations_after_the_head() -> None:
    head = nn.Linear(4, 3).double()
    y = head(X)
    y.mul_(2).add_(1)
    npl.LossHook(damping=0.1)(F.cross_entropy(y, T)).backward()
    g, h = gradients_and_hessians(lambda v: F.cross_entropy(v, T), y)
    taken = step(g, h, "fisher", "mean", 1, 0.1)
    # The boundary is the head's own output; y = 2 h + 1, so in h gradients are doubled.
    g2 = 2 * g
    taken = step(g2, 4 * h, "fisher", "mean", 1, 0.1)
    assert relative_error(head.weight.grad, taken.T @ X / 6) <= 1e-12


def test_grad_scaler_and_half_precision() -> None:
    """fp16 outputs under a scale of 65536: gradients of 1e-6 a sample do not underflow, overflow is passed on."""
    head = nn.Linear(4, 3).half()
    y = head(X.half()).float()
    loss = 1e-5 * F.cross_entropy(y, T)
    (npl.LossHook(damping=1e-4)(loss) * 65536).backward()
    g, h = gradients_and_hessians(lambda v: 1e-5 * F.cross_entropy(v, T), y.double())
    taken = step(g, h, "fisher", "mean", 1, 1e-4)
    assert relative_error(head.weight.grad.double(), taken.T @ X * 65536 / 6) <= 5e-3
    head.zero_grad()
    (npl.LossHook(damping=1e-12)(F.cross_entropy(head(X.half()).float(), T)) * 65536).backward()
    assert not bool(torch.isfinite(head.weight.grad).all()), "a GradScaler has to see the overflow"


def test_a_bfloat16_loss_of_many_samples() -> None:
    """The number of samples, 1,001 here, has no exact bfloat16; it must not enter the gradient as one."""
    x = torch.randn(1001, 3, generator=GENERATOR)
    head = nn.Linear(3, 2, bias=False)
    y = head(x)
    hook = npl.LossHook(damping=1.0)
    hook(y.square().sum(-1).mean().bfloat16())
    taken = npl.newton_step(lambda v: v.square().sum(-1).mean(), y, damping=1.0)
    rms = float(taken.gradient.square().sum(-1).mean().sqrt())
    assert hook.diagnostics()["gradient_norm"] == pytest.approx(rms, rel=1e-5)


def test_a_non_finite_gradient_stays_and_is_counted() -> None:
    net = model()
    hook = npl.LossHook()
    for value in (1.0, float("nan"), 1.0):
        net.zero_grad()
        hook(F.cross_entropy(net(X) * value, T)).backward()
        assert bool(torch.isfinite(flat(net)).all()) == (value == 1.0)
    assert hook.diagnostics()["fallbacks"] == 1
    with pytest.raises(npl.NonFiniteError, match="not finite in 6 of 6 samples"):
        npl.LossHook(on_nonfinite="raise")(F.cross_entropy(net(X) * torch.nan, T))


def test_a_nan_batch_does_not_poison_the_running_mean() -> None:
    net = model()
    clean, dirty = npl.LossHook(), npl.LossHook()
    losses = [lambda: F.cross_entropy(net(X), T), lambda: F.cross_entropy(net(X) * torch.nan, T)]
    for pick in (0, 1, 0):
        dirty(losses[pick]()).backward()
        if pick == 0:
            clean(losses[0]()).backward()
    assert dirty.diagnostics()["damping"] == clean.diagnostics()["damping"]


@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
def test_nothing_is_kept_alive(curvature: str) -> None:
    """Hooks refer to tensors and not to nodes: the graph goes when the loss goes, without the garbage collector."""
    net = model()
    hook = npl.LossHook(curvature=curvature, damping=0.1)
    gc.disable()
    try:
        for _ in range(3):
            y = net(X)
            kept = weakref.ref(y)
            loss = hook(F.cross_entropy(y, T))
            loss.backward()
            del y, loss
            assert kept() is None
    finally:
        gc.enable()


def test_state_survives_a_checkpoint() -> None:
    net = model()
    hook = npl.LossHook()
    for k in range(3):
        hook(F.cross_entropy(net(X) * (k + 1), T))
    file = io.BytesIO()
    torch.save(hook.state_dict(), file)
    file.seek(0)
    restored = npl.LossHook()
    restored.load_state_dict(torch.load(file, weights_only=True))
    for h in (hook, restored):
        h(F.cross_entropy(net(X), T)).backward()
    assert hook.diagnostics() == restored.diagnostics()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda hook: pickle.loads(pickle.dumps(hook))])
@pytest.mark.parametrize("curvature", ["fisher", "hessian", "norm", "auto"])
def test_copies_go_on_from_the_same_state(clone: Callable[[Any], Any], curvature: str) -> None:
    net = model()
    hook, wrapped = npl.LossHook(curvature=curvature), npl.NewtonLoss(nn.CrossEntropyLoss(), curvature=curvature)
    for k in range(3):
        hook(F.cross_entropy(net(X) * (k + 1), T)).backward()
        wrapped(net(X) * (k + 1), T).backward()
    other, other_wrapped = clone(hook), clone(wrapped)
    assert other.diagnostics() == {}
    for h in (hook, other):
        h(F.cross_entropy(net(X), T)).backward()
    assert hook.diagnostics() == other.diagnostics()
    gradients = []
    for loss in (wrapped, other_wrapped):
        net.zero_grad()
        loss(net(X), T).backward()
        gradients.append(flat(net))
    assert torch.equal(*gradients)


def test_no_grad_is_left_alone_and_random_state_is_the_users() -> None:
    net = model()
    hook = npl.LossHook(curvature="hessian")
    with torch.no_grad():
        loss = F.cross_entropy(net(X), T)
        assert hook(loss) is loss
    assert hook.diagnostics() == {}
    before = torch.get_rng_state()
    hook(F.cross_entropy(net(X), T)).backward()
    assert torch.equal(before, torch.get_rng_state())


def test_a_batch_without_outputs_after_others_is_counted() -> None:
    net = model()
    hook = npl.LossHook(damping=0.1)
    hook(F.cross_entropy(net(X), T)).backward()
    hook(net[2].weight.square().sum() + net[2].bias.square().sum())
    assert hook.diagnostics()["fallbacks"] == 1


def test_boundaries_of_different_sizes_under_one_mean() -> None:
    """Two heads, one a prediction for each of 6 samples, one for each of 12: each uses its own number of rows."""
    one, two = nn.Linear(4, 3).double(), nn.Linear(4, 2).double()
    x2, t2 = torch.cat([X, X + 1]), torch.arange(12) % 2
    npl.LossHook(damping=0.1)(F.cross_entropy(one(X), T) + F.cross_entropy(two(x2), t2)).backward()
    for head, x, t in ((one, X, T), (two, x2, t2)):
        assert (
            relative_error(head.weight.grad, fisher_gradient(head, x, t)[: head.weight.numel()].view_as(head.weight))
            <= 1e-12
        )


def test_an_empty_batch_passes_through() -> None:
    net = model()
    hook = npl.LossHook(damping=0.1, reduction="sum")
    hook(F.cross_entropy(net(X[:0]), T[:0], reduction="sum")).backward()
    assert bool((flat(net) == 0).all())


def test_diagnostics_are_those_of_the_step() -> None:
    net = model()
    hook = npl.LossHook(curvature="hessian", damping=0.1)
    y = net(X)
    loss = hook(F.cross_entropy(y, T))
    assert hook.diagnostics() == {}, "the step is taken in the backward pass"
    loss.backward()
    g, h = gradients_and_hessians(lambda v: F.cross_entropy(v, T), y)
    values = torch.linalg.eigvalsh(h.mean(0))
    taken = step(g, h, "hessian", "mean", 1, 0.1)
    expected = {
        "gradient_norm": float(g.square().sum(-1).mean().sqrt()),
        "step_norm": float(taken.square().sum(-1).mean().sqrt()),
        "eig_min": float(values[0]),
        "eig_max": float(values[-1]),
        "damping": 0.1,
        "fallbacks": 0.0,
    }
    assert hook.diagnostics() == pytest.approx(expected, abs=1e-12)
    assert repr(hook).startswith("LossHook(curvature='hessian', damping=0.1)  # 'output0' of shape (6, 3), 6 samples (")


class TestHooksOfTheUser:
    """On the outputs themselves: they belong below the loss, and see the step."""

    @staticmethod
    def sent(curvature: str, change: Any, **options: Any) -> Tensor:
        torch.manual_seed(0)
        x = torch.randn(6, 4, dtype=torch.float64)
        layer = nn.Linear(4, 3).double()
        y = layer(x)
        y.register_hook(change)
        npl.LossHook(curvature=curvature, damping=0.1, **options)(
            (y.sin() * y.cos().sum(-1, keepdim=True)).mean()
        ).backward()
        assert layer.bias.grad is not None
        return layer.bias.grad

    def test_one_that_changes_the_gradient_changes_the_step_once(self) -> None:
        plain = self.sent("fisher", lambda g: None)
        assert relative_error(self.sent("fisher", lambda g: 3 * g), 3 * plain) <= 1e-14

    def test_with_a_hessian_it_falls_back_and_says_so(self) -> None:
        """Such a hook also sees, and changes, the products that make the Hessian."""
        fisher = self.sent("fisher", lambda g: None)
        with pytest.warns(
            UserWarning, match="Fisher in place of Hessian.*a hook on the outputs changes their gradient"
        ):
            changed = self.sent("hessian", lambda g: 3 * g)
        assert relative_error(changed, 3 * fisher) <= 1e-14

    def test_one_that_only_looks_changes_nothing(self) -> None:
        without, seen = self.sent("hessian", lambda g: None), []
        looked = self.sent("hessian", lambda g: seen.append(g.shape))
        assert torch.equal(looked, without)
        assert seen[-1] == (6, 3)
