"""Existing projects: models as people write them, under the Trainer, against the surrogate written out: <= 1e-10."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.cases import CLASSES, FEATURES, Case, Functional, N
from tests.lightning.fits import (
    Batches,
    batches_of,
    case_module,
    moved,
    parameters,
    plain_module,
    surrogate_gradients,
    trainer,
)
from tests.lightning.test_exact import callback, worst
from tests.models import MODELS
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin_lightning import NewtonLosses


@pytest.mark.parametrize("options", ["fisher-mean", "hessian-mean", "hessian-per_sample", "norm-mean"])
@pytest.mark.parametrize("make", MODELS, ids=lambda c: c.__name__)
def test_every_model_moves_by_the_surrogates_gradient(pl: Any, make: type[Case], options: str) -> None:
    curvature, structure = options.split("-")
    batches = batches_of(make, 2)
    module = case_module(pl, make)
    before = parameters(module)
    expected = surrogate_gradients(module.model, batches, curvature, structure)
    newton = callback(curvature, structure, feature_dims=make.feature_dims)
    trainer(pl, newton, accumulate_grad_batches=2).fit(module, Batches(batches))
    ours = [m for m, p in zip(moved(before, module), module.parameters(), strict=True) if p.requires_grad]
    assert worst(ours, expected) <= 1e-10
    frozen = [m for m, p in zip(moved(before, module), module.parameters(), strict=True) if not p.requires_grad]
    assert not any(m.any() for m in frozen)


def test_everything_frozen_is_an_error_that_says_so(pl: Any) -> None:
    module = case_module(pl, Functional)
    module.requires_grad_(False)
    with pytest.raises(npl.NoGradientError, match="every parameter is frozen"):
        trainer(pl, callback()).fit(module, Batches(batches_of(Functional, 1)))
    assert "training_step" not in vars(module)


class Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Linear(2, FEATURES)
        self.critic = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 1))

    def critic_loss(self, x: Tensor) -> Tensor:
        fake = self.generator(x[:, :2]).detach()
        return F.softplus(-self.critic(x)).mean() + F.softplus(self.critic(fake)).mean()

    def generator_loss(self, x: Tensor) -> Tensor:
        return F.softplus(-self.critic(self.generator(x[:, :2]))).mean()


def test_two_losses_at_one_critic(pl: Any) -> None:
    """A GAN: real and fake in the critic's loss, and the generator's; each has a running curvature of its own.

    ``toggle_optimizer`` freezes the critic while the generator trains: then it is a part of the loss, and the step is
    taken at the generated samples.
    """

    def training_step(self: Any, batch: Any, batch_idx: int) -> None:
        critic, generator = self.optimizers()
        for optimizer, loss in ((critic, self.model.critic_loss), (generator, self.model.generator_loss)):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward(loss(batch[0]))
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def optimizers_of(model: Gan) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.critic, model.generator)]

    torch.manual_seed(0)
    module = plain_module(
        pl,
        Gan().double(),
        lambda *_: torch.zeros(()),
        training_step=training_step,
        configure_optimizers=lambda self: optimizers_of(self.model),
        automatic_optimization=False,
    )
    torch.manual_seed(0)
    twin = Gan().double()
    batches = batches_of(Functional, 4)
    newton = NewtonLosses(damping="auto")
    trainer(pl, newton).fit(module, Batches(batches))
    assert list(newton.hook.state_dict()["rules"]) == ["model.critic.2", "loss2/model.generator"]

    hooks, optimizers = [npl.LossHook(), npl.LossHook()], optimizers_of(twin)
    for hook in hooks:
        hook.set_optimizer(optimizers)
    for x, _ in batches:
        for k, loss in enumerate((twin.critic_loss, twin.generator_loss)):
            twin.critic.requires_grad_(k == 0)
            optimizers[k].zero_grad()
            hooks[k](loss(x)).backward()
            optimizers[k].step()
    assert worst(parameters(module.model), parameters(twin)) <= 1e-10


def contrastive(y: Tensor, temperature: float = 0.5) -> Tensor:
    """InfoNCE between the first and the second half of the batch: every sample depends on every other."""
    first, second = F.normalize(y, dim=-1).chunk(2)
    return F.cross_entropy(first @ second.T / temperature, torch.arange(len(first)))


class TestMetricLearning:
    """A loss that couples the samples has no per-sample Hessian; Fisher needs none."""

    def module(self, pl: Any) -> Any:
        torch.manual_seed(0)
        return plain_module(pl, nn.Linear(FEATURES, CLASSES).double(), lambda m, batch: contrastive(m(batch[0])))

    def test_hessian_says_so_and_leaves_the_module_alone(self, pl: Any) -> None:
        module = self.module(pl)
        before = parameters(module)
        with pytest.raises(npl.BatchCoupledError, match=r"Use curvature='fisher' or 'norm'\."):
            trainer(pl, callback("hessian")).fit(module, Batches(batches_of(Functional, 2)))
        assert all(map(torch.equal, parameters(module), before))
        assert "training_step" not in vars(module)

    def test_auto_takes_fisher(self, pl: Any) -> None:
        batches = batches_of(Functional, 1)
        module = self.module(pl)
        before = parameters(module)
        y = module.model(batches[0][0])
        (gradient,) = torch.autograd.grad(contrastive(y), y, retain_graph=True)
        g = N * gradient
        c = g.T @ g / N + 0.05 * torch.eye(CLASSES, dtype=torch.float64)
        expected = torch.autograd.grad(y, list(module.parameters()), torch.linalg.solve(c, g.T).T / N)
        trainer(pl, NewtonLosses(curvature="auto", damping=0.05)).fit(module, Batches(batches))
        assert worst(moved(before, module), list(expected)) <= 1e-10
