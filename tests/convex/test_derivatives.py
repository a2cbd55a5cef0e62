"""Every door to derivatives: backward, double backward, forward mode, torch.func, closed forms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.convex.problems import known_qp
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import newton_plugin as npl
from newton_plugin.convex import BPQPLayer, NestedForwardError, solve_qp

NAMES = "QpAbGh"


def outputs(*data: Tensor) -> tuple[Tensor, ...]:
    solution = solve_qp(*data, solver="torch")
    return solution.x, solution.nu, solution.lam


def cubic(*data: Tensor) -> Tensor:
    return (solve_qp(*data, solver="torch").x ** 3).sum()


def one_argument(data: list[Tensor], i: int, fn: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: fn(*data[:i], t, *data[i + 1 :])


@pytest.mark.parametrize(("batch", "shared"), [(None, False), (2, False), (2, True)])
def test_gradcheck(batch: int | None, shared: bool) -> None:
    leaves = known_qp(3, 1, 4, batch=batch, shared=shared, active=0.5, seed=3).leaves()
    assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradcheck(outputs, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, leaves, fast_mode=batch is not None)


@pytest.mark.parametrize("shared", [False, True])
def test_batched_cotangents(shared: bool) -> None:
    """``is_grads_batched``, in one more order than one: what LossHook's Hessian uses."""
    leaves = known_qp(4, 1, 5, batch=3, shared=shared, active=0.4, seed=3).leaves()
    x = solve_qp(*leaves, solver="torch").x
    several = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = torch.autograd.grad((x**3).sum(), leaves[1], create_graph=True)[0]
    for out in (x, first):
        batched = torch.autograd.grad(out, leaves, several, is_grads_batched=True, retain_graph=True)
        for j in range(2):
            alone = torch.autograd.grad(out, leaves, several[j], retain_graph=True)
            for a, b in zip(batched, alone, strict=True):
                assert torch.allclose(a[j], b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("i", range(6))
def test_hessians_agree(i: int) -> None:
    data = [t.detach() for t in known_qp(4, 1, 5, active=0.4, seed=4).leaves()]
    fn = one_argument(data, i, cubic)
    reference = torch.autograd.functional.hessian(fn, data[i])
    scale = reference.abs().max()
    for rule in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f))):
        assert (rule(fn)(data[i]) - reference).abs().max() < 1e-9 * scale


@pytest.mark.parametrize("i", range(6))
def test_vmap_equals_a_loop(i: int) -> None:
    batch = [t.detach() for t in known_qp(4, 1, 5, batch=3, active=0.4, seed=5).leaves()]
    x = vmap(lambda *data: solve_qp(*data, solver="torch").x)(*batch)
    assert torch.allclose(x, solve_qp(*batch).x, rtol=1e-12)
    mapped = vmap(hessian(cubic, argnums=i))(*batch)
    for j in range(3):
        assert torch.allclose(mapped[j], hessian(cubic, argnums=i)(*[t[j] for t in batch]), rtol=1e-8, atol=1e-10)


def test_vmap_over_some_arguments_and_inner_batches() -> None:
    Q, _, A, b, G, h = [t.detach() for t in known_qp(4, 1, 5, active=0.4, seed=6).leaves()]
    ps = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(p: Tensor) -> Tensor:
        return (solve_qp(Q, p, A, b, G, h).x ** 3).sum()

    mapped = vmap(grad(loss))(ps)
    looped = torch.stack([grad(loss)(q) for q in ps])
    assert torch.allclose(mapped, looped, rtol=1e-12)
    inner = vmap(lambda Q: solve_qp(Q, ps[0], A, b, G, h).x)(torch.stack([Q, 2 * Q]))
    assert torch.allclose(inner[1], solve_qp(2 * Q, ps[0], A, b, G, h).x, rtol=1e-12)


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("i", range(6))
def test_closed_form_jacobian(i: int, batch: int | None) -> None:
    data = [t.detach() for t in known_qp(5, 2, 6, batch=batch, active=0.4, seed=7).leaves()]
    closed = solve_qp(*data).jacobian(NAMES[i])
    rule = jacrev(lambda *data: solve_qp(*data).x, argnums=i)
    by_autograd = rule(*data) if batch is None else vmap(rule)(*data)
    if NAMES[i] == "Q":
        by_autograd = 0.5 * (by_autograd + by_autograd.mT)
    assert torch.allclose(closed, by_autograd, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wrt", ["p", "b", "h"])
@pytest.mark.parametrize("active", [0.0, 0.3, 0.8])
def test_closed_form_hessian_is_double_backward(active: float, wrt: str) -> None:
    """J'HJ against double backward of a loss that is not quadratic, to 1e-9."""
    data = [t.detach() for t in known_qp(6, 2, 8, batch=4, active=active, condition=100.0, seed=8).leaves()]
    i = NAMES.index(wrt)
    solution = solve_qp(*data)
    closed = solution.hessian(torch.diag_embed(6 * solution.x), wrt)
    reference = vmap(hessian(cubic, argnums=i))(*data)
    assert (closed - reference).abs().max() <= 1e-9 * reference.abs().max().clamp(min=1e-3)


def test_closed_form_mixed_block() -> None:
    data = [t.detach() for t in known_qp(6, 2, 8, active=0.3, seed=9).leaves()]
    solution = solve_qp(*data)
    closed = solution.hessian(torch.diag(6 * solution.x), "p", "h")
    reference = jacfwd(grad(cubic, argnums=1), argnums=5)(*data)
    assert torch.allclose(closed, reference, rtol=1e-9, atol=1e-11)


def test_nested_forward_mode_is_refused() -> None:
    data = [t.detach() for t in known_qp(4, 1, 5, seed=4).leaves()]
    with pytest.raises(NestedForwardError, match=r"torch.func.hessian"):
        jacfwd(jacfwd(one_argument(data, 1, cubic)))(data[1])


@pytest.mark.parametrize("curvature", ["hessian", "fisher"])
def test_newton_loss_through_the_layer(curvature: str) -> None:
    """A decision loss under Newton Losses is the explicit surrogate with the closed-form curvature."""
    known = known_qp(4, 1, 5, active=0.4, seed=10)
    Q, _, A, b, G, h = (t.detach() for t in known.data if t is not None)
    g = torch.Generator().manual_seed(0)
    costs = torch.randn(6, 4, generator=g, dtype=torch.float64).requires_grad_()
    target = torch.randn(6, 4, generator=g, dtype=torch.float64)

    def regret(costs: Tensor, target: Tensor) -> Tensor:
        x = solve_qp(Q, costs, A, b, G, h).x
        return ((x - target) ** 2).sum(-1).mean()

    damping = 0.3
    loss = npl.newton_loss(regret, curvature=curvature, damping=damping)(costs, target)
    (ours,) = torch.autograd.grad(loss, costs)
    with torch.no_grad():
        solution = solve_qp(Q, costs, A, b, G, h)
        J = solution.jacobian("p")
        gradient = (J.mT @ (2 * (solution.x - target)).unsqueeze(-1)).squeeze(-1)
        if curvature == "hessian":
            C = solution.hessian(2 * torch.eye(4, dtype=torch.float64)).mean(0)
        else:
            C = gradient.mT @ gradient / 6
        step = torch.linalg.solve(C + damping * torch.eye(4, dtype=torch.float64), gradient.mT).mT
    assert torch.allclose(loss, regret(costs, target))
    assert torch.allclose(ours, step / 6, rtol=1e-9, atol=1e-12)


def test_loss_hook_through_the_layer() -> None:
    """The same by one line in a loop: the loss tensor's live graph."""
    known = known_qp(4, 1, 5, active=0.4, seed=10)
    Q, _, A, b, G, h = (t.detach() for t in known.data if t is not None)
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 4, dtype=torch.float64)
    inputs = torch.randn(6, 3, dtype=torch.float64)
    layer = BPQPLayer()

    def weights(hook: npl.LossHook | None) -> Tensor:
        net.zero_grad()
        costs = net(inputs)
        loss = (layer(Q, costs, A, b, G, h) ** 2).sum(-1).mean()
        if hook is not None:
            loss = hook(loss)
        else:
            wrapped = npl.newton_loss(
                lambda costs: (layer(Q, costs, A, b, G, h) ** 2).sum(-1).mean(), curvature="hessian", damping=0.5
            )
            loss = wrapped(costs)
        loss.backward()
        assert net.weight.grad is not None
        return net.weight.grad.clone()

    hooked = weights(npl.LossHook(curvature="hessian", damping=0.5))
    assert torch.allclose(hooked, weights(None), rtol=1e-9, atol=1e-12)
