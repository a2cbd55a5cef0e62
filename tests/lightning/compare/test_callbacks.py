"""What arms do to an optimizer: the learning rate times a factor, and gradients of the usual length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.lightning.compare import small
from tests.lightning.fits import Batches, trainer
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

from newton_plugin_lightning import ComparisonError
from newton_plugin_lightning._compare.controls import UsualLength
from newton_plugin_lightning._compare.follow import Follow
from newton_plugin_lightning._compare.tuning import MultiplyRate, rates_of


class Nested(SGD):
    """Its step calls the step of its base, whose hooks run too."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def every_step(scheduler: Any, optimizer: Any) -> dict[str, Any]:
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


# What a module with learning rate lr configures; a factor on lr must be a factor on every rate that comes of it.
CONFIGURED: dict[str, Callable[[Any, float], Any]] = {
    "sgd": lambda p, lr: SGD(p, lr, momentum=0.9),
    "adamw": lambda p, lr: AdamW(p, lr, weight_decay=0.1),
    "nested": lambda p, lr: Nested(p, lr),
    "warm-up": lambda p, lr: every_step(LambdaLR(o := SGD(p, lr), lambda step: min(1, step / 5)), o),
    "cosine": lambda p, lr: every_step(CosineAnnealingLR(o := SGD(p, lr), 12), o),
    "one cycle": lambda p, lr: every_step(OneCycleLR(o := SGD(p, lr), lr, total_steps=12), o),
    "lbfgs": lambda p, lr: torch.optim.LBFGS(p, lr, max_iter=3),
    "plateau": lambda p, lr: {
        "optimizer": (o := SGD(p, lr)),
        "lr_scheduler": {"scheduler": ReduceLROnPlateau(o, patience=0), "monitor": "val/loss"},
    },
    "two groups": lambda p, lr: SGD([{"params": [(p := list(p))[0]], "lr": lr / 7}, {"params": p[1:]}], lr),
}


def trained(pl: Any, configured: Any, lr: float, *callbacks: Any, **options: Any) -> tuple[list[torch.Tensor], Any]:
    """Parameters after twelve steps, and the Trainer."""
    torch.manual_seed(0)
    module = small.module(pl.__name__, **options)
    module.configure_optimizers = lambda: configured(module.net.parameters(), lr)
    fit = trainer(pl, *callbacks, max_epochs=3)
    fit.fit(module, Batches([tuple(batch) for batch in small.loader()]), Batches([next(iter(small.loader()))]))
    return [p.detach() for p in module.net.parameters()], fit


@pytest.mark.parametrize("name", CONFIGURED)
def test_a_factor_is_a_factor_of_the_modules_own_rate(pl: Any, name: str) -> None:
    callback = MultiplyRate(2.0)
    ours, fit = trained(pl, CONFIGURED[name], 0.01, callback)
    expected, other = trained(pl, CONFIGURED[name], 0.02)
    plain, _ = trained(pl, CONFIGURED[name], 0.01)
    for p, q, without in zip(ours, expected, plain, strict=True):
        torch.testing.assert_close(p, q)
        assert not torch.allclose(p, without)
    assert callback.learning_rates == pytest.approx(rates_of(other.optimizers))
    now, twice = ([group["lr"] for o in one.optimizers for group in o.param_groups] for one in (fit, other))
    assert twice == pytest.approx([2 * rate for rate in now])  # put back: the user's own
    assert not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in fit.optimizers)


def test_in_manual_optimization_too(pl: Any) -> None:
    ours, _ = trained(pl, CONFIGURED["adamw"], 0.01, MultiplyRate(3.0), manual=True)
    expected, _ = trained(pl, CONFIGURED["adamw"], 0.03, manual=True)
    torch.testing.assert_close(ours, expected)


def test_a_module_that_sets_its_rate_in_the_training_step(pl: Any) -> None:
    """The step is inside the optimizer's closure; what it sets is multiplied like everything else."""

    class Sets(pl.Callback):
        def __init__(self, base: float) -> None:
            self.base, self.seen = base, []

        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
            group = optimizer.param_groups[0]  # called inside the closure
            self.seen.append(group["lr"])
            group["lr"] = self.base / (1 + trainer.global_step)

    sets = Sets(0.01)
    ours, _ = trained(pl, CONFIGURED["sgd"], 0.01, sets, MultiplyRate(2.0))
    expected, _ = trained(pl, CONFIGURED["sgd"], 0.02, Sets(0.02))
    torch.testing.assert_close(ours, expected)
    assert sets.seen[:3] == pytest.approx([0.01, 0.01, 0.005])


def test_an_optimizer_without_a_rate(pl: Any) -> None:
    class NoRate(Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        def step(self, closure: Any = None) -> Any:
            return closure() if closure is not None else None

    with pytest.raises(ComparisonError, match=r"NoRate has a parameter group without 'lr'.*--rates 1"):
        trained(pl, lambda p, lr: NoRate(p), 0.01, MultiplyRate(2.0))
    trained(pl, lambda p, lr: NoRate(p), 0.01, MultiplyRate(1.0))


# The controls


def controlled(kind: Any, norms: list[float]) -> list[float]:
    """The norms that gradients of these norms get, over two parameters."""
    parameters = [torch.zeros(3, requires_grad=True), torch.zeros(1, requires_grad=True)]
    optimizer, callback, found = SGD(parameters, 1.0), UsualLength(kind), []
    for norm in norms:
        parameters[0].grad = torch.tensor([0.6, 0.0, 0.0]) * norm
        parameters[1].grad = torch.tensor([0.8]) * norm
        callback.on_before_optimizer_step(None, None, optimizer)
        found.append(float(torch.cat([p.grad for p in parameters if p.grad is not None]).norm()))
    return found


def usual(norms: list[float]) -> float:
    """The root of the running mean of squares, decay 0.9, written out."""
    weights = [0.9 ** (len(norms) - 1 - k) for k in range(len(norms))]
    return (sum(w * n * n for w, n in zip(weights, norms, strict=True)) / sum(weights)) ** 0.5


NORMS = [1.0, 4.0, 2.0, 0.5, 10.0, *(0.1 * k for k in range(1, 30))]


def test_normalised() -> None:
    found = controlled("normalised", NORMS)
    for k, norm in enumerate(NORMS):
        first = NORMS[: min(k + 1, 20)]
        length = (sum(n * n for n in first) / len(first)) ** 0.5
        assert found[k] == pytest.approx(norm * length / usual(NORMS[: k + 1]), rel=1e-5)


def test_clipped() -> None:
    found = controlled("clipped", NORMS)
    expected = [min(norm, usual(NORMS[: k + 1])) for k, norm in enumerate(NORMS)]
    assert found == pytest.approx(expected, rel=1e-5)
    assert any(a < b for a, b in zip(found, NORMS, strict=True))


@pytest.mark.parametrize("kind", ["normalised", "clipped"])
def test_norms_that_are_not_finite_are_left_out(kind: str) -> None:
    found = controlled(kind, [float("inf"), 2.0, float("nan"), 3.0])
    assert not torch.tensor([found[0], found[2]]).isfinite().any()  # so a GradScaler still skips them
    assert [found[1], found[3]] == pytest.approx(controlled(kind, [2.0, 3.0]))


@pytest.mark.parametrize("kind", ["normalised", "clipped"])
def test_zero_gradients_stay_zero(kind: str) -> None:
    assert controlled(kind, [0.0, 1.0, 0.0])[::2] == [0.0, 0.0]


def test_a_control_acts_on_a_fit(pl: Any) -> None:
    plain, _ = trained(pl, CONFIGURED["sgd"], 0.01)
    control, _ = trained(pl, CONFIGURED["sgd"], 0.01, UsualLength("normalised"))
    assert not torch.allclose(plain[0], control[0])


def test_the_curve_of_a_steps_own_metric(pl: Any) -> None:
    follow = Follow("train/loss")

    class Logs(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            pl_module.log("train/loss", outputs["loss"])

    trained(pl, CONFIGURED["sgd"], 0.01, Logs(), follow)
    assert follow.curve
    assert follow.curve[-1][0] <= small.STEPS


def test_long_curves_are_thinned() -> None:
    follow = Follow("x")
    follow.curve = [(k, float("nan") if k == 3 else float(k)) for k in range(1000)]
    thin = follow.thinned()
    assert len(thin) == 200
    assert (thin[0], thin[-1]) == ((0, 0.0), (999, 999.0))
    assert all(math.isfinite(value) for _, value in thin)
