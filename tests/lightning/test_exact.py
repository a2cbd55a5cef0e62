"""What a fit with the callback does to the parameters, against the surrogate written out: <= 1e-10."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.cases import CURVATURES, MODULES, STRUCTURES, Case, Functional, TwoHeads
from tests.lightning.fits import (
    DAMPING,
    Batches,
    batches_of,
    case_module,
    classifier_module,
    moved,
    parameters,
    surrogate_gradients,
    trainer,
)
from tests.twins import gradients_and_hessians, relative_error, step
from torch import Tensor

from newton_plugin_lightning import NewtonLosses

OPTIONS = [(c, s) for c in CURVATURES for s in STRUCTURES if c != "norm" or s == "mean"]
pytestmark = pytest.mark.filterwarnings("ignore:newton_plugin leaves one boundary out:UserWarning")


def callback(curvature: str = "fisher", structure: str = "mean", **options: Any) -> NewtonLosses:
    damping = "auto" if curvature == "norm" else DAMPING
    return NewtonLosses(curvature=curvature, structure=structure, damping=damping, **options)  # type: ignore[arg-type]


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Over all parameters together: some gradients (the bias of a shift-invariant loss) are zero but for rounding."""
    return relative_error(*(torch.cat([t.flatten() for t in tensors]) for tensors in (ours, theirs)))


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
@pytest.mark.parametrize("make", MODULES, ids=lambda c: c.__name__)
def test_every_module_moves_by_the_surrogates_gradient(pl: Any, make: type[Case], options: tuple[str, str]) -> None:
    """Functional, criterion, inline algorithm, two heads, dict, intermediate output; accumulation 1 and 4."""
    for accumulate in (1, 4):
        batches = batches_of(make, accumulate)
        module = case_module(pl, make)
        before = parameters(module)
        expected = surrogate_gradients(module.model, batches, *options)
        fit = trainer(pl, callback(*options), accumulate_grad_batches=accumulate)
        fit.fit(module, Batches(batches))
        assert worst(moved(before, module), expected) <= 1e-10, accumulate


def test_the_callback_is_what_makes_the_difference(pl: Any) -> None:
    """The tests here can fail: without the callback the parameters move by the plain gradient."""
    batches = batches_of(Functional, 1)
    module = case_module(pl, Functional)
    before = parameters(module)
    expected = surrogate_gradients(module.model, batches, "fisher")
    trainer(pl).fit(module, Batches(batches))
    assert worst(moved(before, module), expected) > 0.1


def test_logged_loss_is_the_plain_one(pl: Any) -> None:
    """Bit for bit, as the user's own code sees it and as Lightning logs it."""
    values = []
    for callbacks in ([], [callback()]):
        module = case_module(pl, TwoHeads)
        fit = trainer(pl, *callbacks)
        fit.fit(module, Batches(batches_of(TwoHeads, 1)))
        values.append((module.losses[0], fit.callback_metrics["loss"].item()))
    assert values[0] == values[1]


@pytest.mark.parametrize("rule", ["norm", "value"])
def test_gradient_clipping_sees_the_surrogates_gradient(pl: Any, rule: str) -> None:
    batches = batches_of(Functional, 1)
    module = case_module(pl, Functional)
    before = parameters(module)
    expected = surrogate_gradients(module.model, batches, "fisher")
    limit = 0.3 * float(torch.cat([g.flatten() for g in expected]).norm())
    if rule == "norm":
        expected = [0.3 * g for g in expected]
    else:
        expected = [g.clamp(-limit, limit) for g in expected]
    fit = trainer(pl, callback(), gradient_clip_val=limit, gradient_clip_algorithm=rule)
    fit.fit(module, Batches(batches))
    # Clipping by norm adds 1e-6 to the norm.
    assert worst(moved(before, module), expected) <= (1e-5 if rule == "norm" else 1e-10)


def boundary_gradients(model: Any, batch: tuple[Tensor, Tensor], below: str) -> list[Tensor]:
    """As ``surrogate_gradients`` with the step at the encoder: the head above it keeps its plain gradient."""
    x, t = batch
    y = model.encoder(x)

    def loss_of(value: Tensor) -> Tensor:
        return F.cross_entropy(model.head(value) if below == "head" else value, t)

    z = y if below == "head" else model.head(y)
    g, h = gradients_and_hessians(loss_of, z)
    taken = step(g, h, "hessian", "mean", 1, DAMPING)
    total = 0.5 * (z - (z.detach() - taken)).square().sum() / len(x)
    if below == "head":
        total = total + F.cross_entropy(model.head(y.detach()), t)
    return list(torch.autograd.grad(total, list(model.parameters())))


@pytest.mark.parametrize(
    ("boundary", "functional"),
    [("model.encoder", False), ("model.head", False), ("model.criterion", False), ("cross_entropy", True)],
)
def test_named_boundaries(pl: Any, boundary: str, functional: bool) -> None:
    """An intermediate submodule, the last one, the criterion, a function of torch.nn.functional."""
    batch = batches_of(Functional, 1)[0]
    module = classifier_module(pl, functional)
    before = parameters(module)
    expected = boundary_gradients(module.model, batch, "head" if boundary.endswith("encoder") else "loss")
    trainer(pl, callback("hessian", boundary=boundary)).fit(module, Batches([batch]))
    assert worst(moved(before, module), expected) <= 1e-10


@pytest.mark.parametrize("mixed", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_follows_full_precision(pl: Any, mixed: str) -> None:
    """Autocast rounds the network to 8 or 11 bits; the step itself is float64, so directions and sizes stay close.

    float16 comes with a gradient scaler: the loss of which backward is called is 65536 times the user's.
    """
    torch.manual_seed(0)
    batches = [tuple(b.float() if b.is_floating_point() else b for b in batch) for batch in batches_of(Functional, 1)]
    changes = []
    for precision in ("32-true", mixed):
        options: dict[str, Any] = {"precision": precision}
        if precision == "16-mixed":  # on a CPU the Trainer's own choice would silently be bf16
            scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
            options = {"plugins": pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)}
        module = case_module(pl, Functional).float()
        before = parameters(module)
        trainer(pl, callback(), **options).fit(module, Batches(batches))
        changes.append(torch.cat([m.flatten() for m in moved(before, module)]))
    assert changes[1].isfinite().all()
    assert not torch.equal(*changes)
    assert torch.cosine_similarity(*changes, dim=0) > 0.999
    assert 0.97 < changes[1].norm() / changes[0].norm() < 1.03


@pytest.mark.parametrize("wrap", [lambda loss: {"loss": loss, "more": 1}, lambda loss: {"loss": loss}])
def test_loss_in_a_dictionary(pl: Any, wrap: Any) -> None:
    batches = batches_of(Functional, 1)

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        return wrap(self.model.loss(self.model(batch[0]), batch[1]))

    module = case_module(pl, Functional, training_step=training_step)
    before = parameters(module)
    expected = surrogate_gradients(module.model, batches, "fisher")
    trainer(pl, callback()).fit(module, Batches(batches))
    assert worst(moved(before, module), expected) <= 1e-10


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_none_skips_the_step(pl: Any) -> None:
    batches = batches_of(Functional, 2)

    def training_step(self: Any, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx == 0 else self.model.loss(self.model(batch[0]), batch[1])

    module = case_module(pl, Functional, training_step=training_step)
    before = parameters(module)
    expected = surrogate_gradients(module.model, batches[1:], "fisher")
    trainer(pl, callback()).fit(module, Batches(batches))
    assert worst(moved(before, module), expected) <= 1e-10


def test_start_step_leaves_the_first_steps_plain(pl: Any) -> None:
    """Two plain steps, then one Newton step from where they ended."""
    batches = batches_of(Functional, 3)
    plain = case_module(pl, Functional)
    trainer(pl).fit(plain, Batches(batches[:2]))
    before = parameters(plain)
    expected = surrogate_gradients(plain.model, batches[2:], "fisher")

    module = case_module(pl, Functional)
    trainer(pl, callback(start_step=2)).fit(module, Batches(batches))
    assert worst(moved(before, module), expected) <= 1e-10


def test_closure_optimizers_run_the_step_several_times(pl: Any) -> None:
    """LBFGS calls the closure several times within one batch: the same as in a plain loop with the hook."""
    from newton_plugin import LossHook

    def configure_optimizers(self: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=5)

    batches = batches_of(Functional, 2)
    module = case_module(pl, Functional, configure_optimizers=configure_optimizers)
    with pytest.warns(UserWarning, match="LBFGS: it compares values of the loss along the gradient"):
        trainer(pl, NewtonLosses()).fit(module, Batches(batches))

    twin, hook = case_module(pl, Functional), LossHook()
    optimizer = torch.optim.LBFGS(twin.parameters(), lr=0.1, max_iter=5)
    for x, t in batches:

        def closure(x: Tensor = x, t: Tensor = t) -> Tensor:
            optimizer.zero_grad()
            loss = hook(twin.model.loss(twin.model(x), t))
            loss.backward()
            return loss

        optimizer.step(closure)
    assert worst(parameters(module), parameters(twin)) <= 1e-12


class TestManualOptimization:
    @staticmethod
    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        optimizers = self.optimizers()
        for k, optimizer in enumerate(optimizers if isinstance(optimizers, list) else [optimizers]):
            loss = (k + 1) * self.model.loss(self.model(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def module(self, pl: Any, **attributes: Any) -> Any:
        return case_module(pl, Functional, training_step=self.training_step, automatic_optimization=False, **attributes)

    def test_manual_backward_is_hooked(self, pl: Any) -> None:
        batches = batches_of(Functional, 1)
        module = self.module(pl)
        before = parameters(module)
        expected = surrogate_gradients(module.model, batches, "fisher")
        trainer(pl, callback()).fit(module, Batches(batches))
        assert worst(moved(before, module), expected) <= 1e-10

    def test_each_loss_of_a_batch(self, pl: Any) -> None:
        """Two optimizers, two losses, two steps; the second loss has its own scale and so its own curvature."""

        def configure_optimizers(self: Any) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(part.parameters(), lr=1.0) for part in (self.model.trunk, self.model.head)]

        def twin_step(model: Case, part: Any, factor: float) -> None:
            x, t = batches[0]
            y = model(x)
            g, h = gradients_and_hessians(lambda v: factor * model.loss(v, t), y)
            taken = step(g, h, "fisher", "mean", 1, DAMPING)
            total = 0.5 * (y - (y.detach() - taken)).square().sum() / len(x)
            grads = torch.autograd.grad(total, list(part.parameters()))
            with torch.no_grad():
                for p, grad in zip(part.parameters(), grads, strict=True):
                    p -= grad

        batches = batches_of(Functional, 1)
        module = self.module(pl, configure_optimizers=configure_optimizers)
        twin = case_module(pl, Functional).model
        trainer(pl, callback()).fit(module, Batches(batches))
        twin_step(twin, twin.trunk, 1)
        twin_step(twin, twin.head, 2)
        assert worst(parameters(module), parameters(twin)) <= 1e-10

    def test_start_step_in_the_middle_of_a_batch(self, pl: Any) -> None:
        """``global_step`` counts optimizer steps: of two in the first batch, the second is a Newton step."""

        def configure_optimizers(self: Any) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(self.parameters(), lr=1.0) for _ in range(2)]

        batch = batches_of(Functional, 1)[0]
        module = self.module(pl, configure_optimizers=configure_optimizers)
        twin = case_module(pl, Functional).model
        trainer(pl, callback(start_step=1, boundary="model.head")).fit(module, Batches([batch]))
        grads = torch.autograd.grad(twin.loss(twin(batch[0]), batch[1]), list(twin.parameters()))
        with torch.no_grad():
            for p, grad in zip(twin.parameters(), grads, strict=True):
                p -= grad
        before = parameters(twin)
        y = twin(batch[0])
        g, h = gradients_and_hessians(lambda v: 2 * twin.loss(v, batch[1]), y)
        taken = step(g, h, "fisher", "mean", 1, DAMPING)
        total = 0.5 * (y - (y.detach() - taken)).square().sum() / len(y)
        expected = list(torch.autograd.grad(total, list(twin.parameters())))
        assert worst(moved(before, module), expected) <= 1e-10

    def test_a_returned_loss_is_not_stepped_twice(self, pl: Any) -> None:
        """In manual optimization the return value is ignored: to hook it would only add a batch to the running mean."""

        def training_step(module: Any, batch: Any, batch_idx: int) -> Tensor:
            self.training_step(module, batch, batch_idx)
            return module.model.loss(module.model(batch[0]), batch[1])

        calls = []
        newton = callback()
        hook = newton.hook
        newton.hook = _Counting(hook, calls)  # type: ignore[assignment]
        module = case_module(pl, Functional, training_step=training_step, automatic_optimization=False)
        trainer(pl, newton).fit(module, Batches(batches_of(Functional, 1)))
        assert len(calls) == 1


class _Counting:
    """A hook that counts its calls."""

    def __init__(self, hook: Any, calls: list[Tensor]) -> None:
        self._hook, self._calls = hook, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hook, name)

    def __call__(self, loss: Tensor, name: str = "") -> Tensor:
        self._calls.append(loss)
        return self._hook(loss, name)
