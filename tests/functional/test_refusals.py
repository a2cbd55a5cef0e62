"""What cannot work under a transform says so by an error of the package: the transform, the argument, what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vmap

import newton_plugin as npl

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch's own forward mode
    pytest.mark.filterwarnings("ignore:newton_plugin:UserWarning"),
]
G = torch.Generator().manual_seed(0)
Y = torch.randn(4, 6, 3, generator=G, dtype=torch.float64)
T = torch.randint(0, 3, (6,), generator=G)
Loss = Callable[[Tensor], Tensor]


def pure(loss_fn: Any = F.cross_entropy, **rule: Any) -> Loss:
    newton = npl.functional.newton_loss(loss_fn, **rule)
    return lambda y: newton.apply(newton.init(y), y, T)[0]


def door(loss_fn: Any = F.cross_entropy, **rule: Any) -> Loss:
    newton = npl.newton_loss(loss_fn, **rule)
    return lambda y: newton(y, T)


def step(loss_fn: Any = F.cross_entropy, **rule: Any) -> Loss:
    return lambda y: npl.newton_step(loss_fn, y, T, **rule).step.sum()


def hook(y: Tensor) -> Tensor:
    return npl.LossHook()(F.cross_entropy(y, T))


def refused(call: Callable[[], Any], *words: str, error: type[Exception] = npl.TransformError) -> None:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


class NoSetup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * ctx.saved_tensors[0] * g


class NoRule(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * ctx.saved_tensors[0] * g


def branching(y: Tensor, t: Tensor) -> Tensor:
    return (y.square() if y.sum() > 0 else y.abs()).sum(-1).mean()


SEEN = torch.zeros(())


def counting(y: Tensor, t: Tensor) -> Tensor:
    SEEN.add_(y.detach().sum())
    return y.square().sum(-1).mean()


UNDER_VMAP: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "no setup_context": lambda y, t: NoSetup.apply(y).sum(-1).mean(),  # type: ignore[attr-defined]
    "no vmap rule": lambda y, t: NoRule.apply(y).sum(-1).mean(),  # type: ignore[attr-defined]
    "a branch on numbers": branching,
    "a number": lambda y, t: y.square().sum() * y.sum().item(),
    "a size that depends on numbers": lambda y, t: y[y > 0].square().sum() / 6,
    "numpy": lambda y, t: y.square().sum() * float(y.detach().numpy().sum()),
    "a captured tensor": counting,
}


@pytest.mark.parametrize("make", [pure, door, step])
@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
@pytest.mark.parametrize("name", UNDER_VMAP)
def test_losses_that_were_not_written_for_vmap(name: str, curvature: str, make: Any) -> None:
    run = make(UNDER_VMAP[name], curvature=curvature)
    for call in (lambda: vmap(run)(Y), lambda: vmap(grad(lambda y: run(y) + 0 * y.sum()))(Y)):
        refused(call, "torch.func cannot transform loss_fn", "setup_context", "npl.LossHook")


def test_a_function_without_setup_context_works_outside() -> None:
    refused(lambda: grad(pure(UNDER_VMAP["no setup_context"]))(Y[0]), "setup_context")
    y = Y[0].clone().requires_grad_()
    door(UNDER_VMAP["no setup_context"])(y * 1).backward()
    assert y.grad is not None
    expected = grad(pure(UNDER_VMAP["no vmap rule"]))(Y[0])
    torch.testing.assert_close(y.grad, expected, rtol=1e-12, atol=0)


def test_a_users_error_is_the_users() -> None:
    def broken(y: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("a fault of the user's own")

    with pytest.raises(RuntimeError, match="a fault of the user's own") as caught:
        grad(pure(broken))(Y[0])
    assert type(caught.value) is RuntimeError
    assert caught.value.__cause__ is None


class Looking(npl.Curvature):
    def step(self, gradient: Tensor, hvp: Any, damping: Any) -> npl.CurvatureStep:
        return npl.CurvatureStep(gradient / float(gradient.norm()), damping=gradient.new_zeros(()))


class LookingDamping(npl.Damping):
    def value(self, scale: Tensor) -> Tensor:
        return scale / 2 if scale > 1 else scale


class Remembering(npl.Curvature):
    """Whose state has no entry before the first step, and no ``initial_state``."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None

    def step(self, gradient: Tensor, hvp: Any, damping: Any) -> npl.CurvatureStep:
        self.mean = gradient.norm() if self.mean is None else (self.mean + gradient.norm()) / 2
        return npl.CurvatureStep(gradient / self.mean, damping=gradient.new_zeros(()))

    def state_dict(self) -> dict[str, Any]:
        return {} if self.mean is None else {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state.get("mean")


@pytest.mark.parametrize("make", [pure, door, step])
@pytest.mark.parametrize(
    "rule", [{"curvature": Looking()}, {"damping": LookingDamping()}], ids=["curvature", "damping"]
)
def test_classes_of_a_users_own_that_look_at_numbers(rule: dict[str, Any], make: Any) -> None:
    assert bool(torch.isfinite(make(**rule)(Y[0].clone().requires_grad_())))
    refused(lambda: vmap(make(**rule))(Y), "torch.func cannot transform the step of curvature=", "Looking", "outside")


def test_classes_of_a_users_own_with_a_state() -> None:
    refused(lambda: grad(pure(curvature=Remembering()))(Y[0]), "initial_state()", error=npl.ShapeError)
    # A single step remembers nothing, and needs none.
    alone = torch.stack([npl.newton_step(F.cross_entropy, y, T, curvature=Remembering()).step for y in Y])
    together = vmap(lambda y: npl.newton_step(F.cross_entropy, y, T, curvature=Remembering()).step)(Y)
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-15)


def test_settings_that_look_at_numbers() -> None:
    every_second = npl.EmpiricalFisher(refresh_every=2)
    for make in (pure, door):
        refused(lambda: grad(make(curvature=every_second))(Y[0]), "refresh_every=2", "use refresh_every=1")  # noqa: B023
    coupled = pure(lambda y, t: (y @ y.T).logsumexp(-1).mean(), curvature="hessian")
    refused(lambda: grad(coupled)(Y[0]), "couples the samples", error=npl.BatchCoupledError)


def test_a_coupled_loss_under_vmap_keeps_its_gradient() -> None:
    """Where nobody can raise."""

    def coupled(y: Tensor, t: Tensor) -> Tensor:
        return (y @ y.T).logsumexp(-1).mean()

    kept = vmap(grad(pure(coupled, curvature="hessian")))(Y)
    torch.testing.assert_close(kept, vmap(grad(lambda y: coupled(y, T)))(Y), rtol=1e-12, atol=1e-15)
    assert bool(vmap(grad(pure(coupled, curvature="hessian", on_nonfinite="raise")))(Y).isnan().all())


def test_chunks_of_members() -> None:
    """A wrapped loss could not tell whose state it keeps; the pure one has it as an argument."""
    refused(lambda: vmap(grad(door()), chunk_size=2)(Y), "chunk_size", "npl.functional.newton_loss")
    torch.testing.assert_close(vmap(grad(pure()), chunk_size=2)(Y), vmap(grad(pure()))(Y), rtol=1e-12, atol=1e-15)
    jacrev(lambda ys: vmap(door())(ys), chunk_size=1)(Y)  # takes the rows of a Jacobian in parts, after the loss


HOOKED: dict[str, Callable[[], Any]] = {
    "vmap": lambda: vmap(hook)(Y),
    "vmap(grad)": lambda: vmap(grad(hook))(Y),
    "jvp": lambda: jvp(hook, (Y[0],), (Y[0],)),
    "jacfwd": lambda: jacfwd(hook)(Y[0]),
    "jacrev": lambda: jacrev(hook)(Y[0]),
    "hessian": lambda: hessian(hook)(Y[0]),
    "jacobian": lambda: torch.autograd.functional.jacobian(hook, Y[0], vectorize=True),
}


@pytest.mark.parametrize("name", HOOKED)
def test_a_hook_says_what_it_cannot_do(name: str) -> None:
    refused(HOOKED[name], "npl.functional.newton_loss")


def test_linearize_is_for_the_pure_door() -> None:
    words = "torch.func.linearize use npl.functional.newton_loss"
    refused(lambda: linearize(door(), Y[0]), words, error=npl.NoGradientError)


def test_targets_with_tangents_of_a_loss_that_torch_cannot_take() -> None:
    """Forward over reverse of mse_loss by its target is a fault of torch."""
    newton = npl.functional.newton_loss(F.mse_loss)
    y, t = Y[0, :, :1], Y[1, :, :1]
    both = jacfwd(lambda y, t: newton.apply(newton.init(y), y, t)[0], argnums=(0, 1))
    refused(lambda: both(y, t), "detach what is differentiated in forward mode")
    jacfwd(lambda y: newton.apply(newton.init(y), y, t)[0])(y)


def test_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Many:
        many = True

    monkeypatch.setattr("newton_plugin._doors.transformed.current_ranks", lambda sync: Many() if sync else Few())
    refused(lambda: grad(door())(Y[0]), "sync=True", "sync=False")
    assert grad(door(sync=False))(Y[0]).shape == Y[0].shape


class Few:
    many = False


@pytest.mark.parametrize("make", [pure, door])
def test_not_finite(make: Any) -> None:
    """ "raise" raises where one can, also in forward mode, and is NaN for the member where one cannot."""
    bad = Y[0].clone()
    bad[1, 2] = torch.nan
    for call in (grad, jacfwd, lambda f: lambda y: jvp(f, (y,), (y,))):
        refused(lambda: call(make(on_nonfinite="raise"))(bad), "in 1 of 6 samples", error=npl.NonFiniteError)  # noqa: B023
    members = torch.stack([Y[0], bad])
    found = vmap(grad(make(on_nonfinite="raise")))(members)
    assert bool(torch.isfinite(found[0]).all())
    assert bool(found[1].isnan().all())
    kept = vmap(grad(make()))(members)
    plain = vmap(grad(lambda y: F.cross_entropy(y, T)))(members)
    torch.testing.assert_close(kept[1], plain[1], equal_nan=True)


def test_tracers() -> None:
    """make_fx records a step, also with sizes left open; torch.export is refused, as its functions have no grad."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def f(y: Tensor, t: Tensor) -> Tensor:
        newton = npl.functional.newton_loss(F.mse_loss)
        return grad(lambda v: newton.apply(newton.init(v), v, t)[0])(y)

    for mode in ("real", "fake", "symbolic"):
        traced = make_fx(f, tracing_mode=mode)(Y[0], Y[1])
        torch.testing.assert_close(traced(Y[2], Y[3]), f(Y[2], Y[3]), rtol=1e-12, atol=1e-15)

    class Training(torch.nn.Module):
        def forward(self, y: Tensor) -> Tensor:
            return pure()(y)

    if hasattr(torch.compiler, "is_exporting"):
        refused(lambda: torch.export.export(Training(), (Y[0],), strict=False), "torch.export")


class TestOneStepForOneLoss:
    """A loss that has its step is left alone by the doors of live graphs; inside of a pure step it is refused."""

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
        x = torch.randn(8, 5, generator=generator, dtype=torch.float64)
        return weight, x, torch.randint(0, 3, (8,), generator=generator)

    def gradient(self, weight: Tensor, loss: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(loss, weight)
        return found

    def test_outside(self) -> None:
        weight, x, t = self.parts()
        newton = npl.functional.newton_loss(F.cross_entropy)
        state = newton.init(x @ weight.T)

        def once(y: Tensor, t: Tensor) -> Tensor:
            return newton.apply(state, y, t)[0]

        wanted = self.gradient(weight, once(x @ weight.T, t))
        assert torch.equal(self.gradient(weight, npl.LossHook()(once(x @ weight.T, t))), wanted)
        assert torch.equal(self.gradient(weight, npl.newton_loss(once)(x @ weight.T, t)), wanted)

    @pytest.mark.parametrize("inner", ["functional", "newton_loss", "LossHook"])
    def test_inside(self, inner: str) -> None:
        weight, x, t = self.parts()
        newton, hook = npl.functional.newton_loss(F.cross_entropy), npl.LossHook()
        losses: dict[str, Any] = {
            "functional": lambda y, t: newton.apply(newton.init(y), y, t)[0],
            "newton_loss": npl.newton_loss(F.cross_entropy),
            "LossHook": lambda y, t: hook(F.cross_entropy(y, t)),
        }
        outer = npl.functional.newton_loss(losses[inner])
        with pytest.raises(npl.TransformError, match="or none of it"):
            outer.apply(outer.init(x @ weight.T), x @ weight.T, t)


class Counter(npl.Damping):
    """A memory that nobody is told of."""

    def __init__(self) -> None:
        self.steps = 0

    def value(self, scale: Tensor) -> Tensor:
        self.steps += 1
        return scale / self.steps


class InPlace(npl.AutoDamping):
    """A state of ours, and beside it a tensor that changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = torch.zeros(())

    def value(self, scale: Tensor, finite: bool = False) -> Tensor:
        self.steps += 1
        return super().value(scale, finite) / self.steps


class Constant(npl.Damping):
    """An attribute that never changes."""

    def __init__(self) -> None:
        self.share, self.table = 0.5, torch.ones(())

    def value(self, scale: Tensor) -> Tensor:
        return scale * self.share * self.table


@pytest.mark.parametrize("under", ["apply", "vmap"])
@pytest.mark.parametrize("make", [Counter, InPlace, Constant])
def test_a_memory_that_a_pure_function_would_forget(make: type[npl.Damping], under: str) -> None:
    y, t = torch.randn(2, 6, 3), torch.randint(0, 3, (6,))
    newton = npl.functional.newton_loss(F.cross_entropy, damping=make())

    def step() -> Any:
        if under == "vmap":
            return vmap(grad(lambda y: newton.apply(newton.init(y), y, t)[0]))(y)
        return newton.apply(newton.init(y[0]), y[0].requires_grad_(), t)

    if make is Constant:
        step()
        return
    with pytest.raises(npl.TransformError, match=rf"{make.__name__} changes its attribute 'steps'"):
        step()


def test_a_step_inside_of_a_loss_that_is_a_number() -> None:
    """``newton_step`` remembers nothing and sends nothing: a loss may use what it returns."""
    y, t = torch.randn(6, 3, dtype=torch.float64), torch.randint(0, 3, (6,))

    def loss(y: Tensor, t: Tensor) -> Tensor:
        return npl.quadratic_surrogate(y, npl.newton_step(F.cross_entropy, y, t).target)

    newton, live = npl.functional.newton_loss(loss), npl.newton_loss(loss)
    found = grad(lambda y: newton.apply(newton.init(y), y, t)[0])(y)
    expected = y.clone().requires_grad_()
    live(expected, t).backward()
    assert expected.grad is not None
    torch.testing.assert_close(found, expected.grad, rtol=1e-12, atol=1e-15)


def test_a_hook_in_forward_mode_without_gradients() -> None:
    """``no_grad`` does not forbid tangents: that of the plain loss would be returned in silence."""
    y, t = torch.randn(6, 3), torch.randint(0, 3, (6,))
    hook = npl.LossHook()
    with torch.no_grad(), pytest.raises(npl.TransformError, match="forward mode takes no backward pass"):
        jvp(lambda y: hook(F.cross_entropy(y, t)), (y,), (y,))
    with torch.no_grad():
        assert torch.isfinite(hook(F.cross_entropy(y, t))), "evaluation alone is left alone"
