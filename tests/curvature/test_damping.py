"""AutoDamping: the rule as written, and the disasters that each part of it is there for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.twins import relative_error
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin._curvature.fisher import EmpiricalFisher
from newton_plugin._curvature.running_mean import RunningMean

G = torch.Generator().manual_seed(0)


def batches(count: int, n: int = 8, m: int = 3) -> Tensor:
    return torch.randn(count, n, m, generator=G, dtype=torch.float64)


def twin(gradients: Tensor, ratio: float, decay: float, growth: float, floor: float, own: float) -> Tensor:
    """The docstring of AutoDamping, line by line; the last batch's steps."""
    m = gradients.shape[-1]
    mean, slow, weight, slow_weight = torch.zeros(m, m, dtype=torch.float64), 0.0, 0.0, 0.0
    steps = torch.empty(0)
    for g in gradients:
        c = g.T @ g / len(g)
        before = mean / weight if weight else None
        if before is not None and c.norm() > growth * before.norm():
            c = c * growth * before.norm() / c.norm()
        mean, weight = decay * mean + (1 - decay) * c, decay * weight + 1 - decay
        average = mean / weight
        scale = float(average.norm()) / m**0.5
        slow, slow_weight = 0.999 * slow + 0.001 * scale, 0.999 * slow_weight + 0.001
        d = ratio * max(scale, floor * slow / slow_weight)
        steps = torch.stack(
            [torch.linalg.solve(average + own / m * torch.outer(x, x) + d * torch.eye(m), x) for x in g]
        )
    return steps


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 0.3, "decay": 0.9, "growth": 10.0, "floor": 1e-3, "own": 1.0},
        {"ratio": 2.0, "decay": 0.5, "growth": 1.5, "floor": 0.5, "own": 0.0},
        {"ratio": 0.1, "decay": 0.99, "growth": 3.0, "floor": 0.9, "own": 5.0},
    ],
)
def test_the_rule_is_the_docstrings(options: dict[str, Any]) -> None:
    gradients = batches(12) * torch.logspace(0, -3, 12, dtype=torch.float64).reshape(-1, 1, 1)
    gradients[7, 2] *= 1e4
    curvature, damping = EmpiricalFisher(), npl.AutoDamping(**options)
    for g in gradients:
        ours = curvature.step(g, None, damping).step
    assert relative_error(ours, twin(gradients, **options)) <= 1e-7  # of an ill-conditioned dense solve


def run(gradients: Tensor, curvature: Any = None, damping: Any = None) -> list[Tensor]:
    curvature, damping = curvature or EmpiricalFisher(), damping or npl.AutoDamping()
    return [curvature.step(g, None, damping).step for g in gradients]


def typical(step: Tensor) -> float:
    return float(step.norm(dim=-1).median())


@pytest.mark.parametrize("curvature", [EmpiricalFisher, lambda: EmpiricalFisher("isotropic")])
def test_one_exploded_sample_moves_little_and_silences_nobody(curvature: Any) -> None:
    gradients = batches(40)
    gradients[20, 0] *= 1e5
    steps = run(gradients, curvature())
    usual = typical(steps[19])
    assert float(steps[20][0].norm()) <= 0.01 * usual, "its own step is bounded by m / |g|"
    assert typical(steps[25]) >= 0.3 * usual
    assert typical(steps[39]) >= 0.7 * usual
    naive = npl.AutoDamping(growth=1e300, own=0.0)
    assert typical(run(gradients, curvature(), naive)[25]) <= 1e-6 * usual, "what the rule is there for"


def test_vanishing_gradients_are_not_blown_up_without_bound() -> None:
    fall = 10.0 ** (-torch.arange(600, dtype=torch.float64) / 50)  # twelve orders of magnitude
    gradients = batches(600) * fall.reshape(-1, 1, 1)
    assert typical(run(gradients)[-1]) <= 1e3 * typical(run(gradients)[10])
    free = npl.AutoDamping(floor=0.0)
    assert typical(run(gradients, damping=free)[-1]) >= 1e9 * typical(run(gradients)[10]), "what the floor is for"


def test_zeros_give_zeros_and_are_forgotten() -> None:
    gradients = batches(6)
    gradients[:3] = 0
    steps = run(gradients)
    assert bool((steps[2] == 0).all())
    assert bool(torch.isfinite(steps[5]).all())
    assert typical(steps[5]) > 0.1


@pytest.mark.parametrize("factor", [1e-12, 1e-3, 1e12])
def test_scale_of_the_loss(factor: float) -> None:
    """The whole rule, state included, is homogeneous: a loss times c divides Fisher's steps by c."""
    gradients = batches(10)
    assert relative_error(run(gradients * factor)[-1] * factor, run(gradients)[-1]) <= 1e-9


def test_batch_size_does_not_matter() -> None:
    gradients = batches(10)
    assert relative_error(run(gradients.repeat(1, 3, 1))[-1][:8], run(gradients)[-1]) <= 1e-9


def test_large_outputs_follow_the_same_scale() -> None:
    """Above 1,024 features only the scale is averaged; an exploded batch still silences nobody."""
    gradients = torch.randn(12, 4, 1100, generator=G, dtype=torch.float64)
    gradients[5] *= 1e5
    steps = run(gradients)
    assert typical(steps[9]) >= 0.1 * typical(steps[4])


class Constant(npl.Damping):
    """A damping rule of a user's own."""

    averaging = npl.Averaging(decay=0.5)

    def value(self, scale: Tensor) -> Tensor:
        return torch.ones_like(scale)


def test_a_rule_of_ones_own() -> None:
    y, t = torch.randn(4, 2, generator=G, requires_grad=True), torch.zeros(4, 2)
    step = npl.newton_step(nn.functional.mse_loss, y, t, damping=Constant())
    c = step.gradient.double().T @ step.gradient.double() / 4
    theirs = torch.linalg.solve(c + torch.eye(2, dtype=torch.float64), step.gradient.double().T).T
    assert relative_error(step.step.double(), theirs) <= 1e-6


def test_repr_names_the_constants() -> None:
    assert repr(npl.AutoDamping()) == "AutoDamping(ratio=0.3, decay=0.9, growth=10, floor=0.001, own=1)"
    assert repr(npl.Tikhonov(0.1)) == "Tikhonov(0.1)"


def test_what_is_not_finite_leaves_the_mean_as_it_was() -> None:
    for first in (torch.full((3,), torch.nan), torch.tensor([1.0, torch.inf, 0.0]), torch.tensor([1.0, 2.0, 3.0])):
        mean = RunningMean()
        before = mean.update(first.double(), 0.5, 10.0)
        assert bool(mean.finite) == bool(first.isfinite().all())
        assert torch.equal(before, first.double() if mean.finite else torch.zeros(3).double())
        for bad in (torch.nan, torch.inf, -torch.inf):
            after = mean.update(torch.tensor([0.0, bad, 1.0], dtype=torch.float64), 0.5, 10.0)
            assert not mean.finite
            assert torch.equal(after, before)
        if not first.isfinite().all():  # the first finite value counts in full, however large
            assert torch.equal(mean.update(torch.full((3,), 1e9).double(), 0.5, 10.0), torch.full((3,), 1e9).double())


@pytest.mark.parametrize("features", [8, 8192])  # as they are, and in parts
@pytest.mark.parametrize(
    "options", [{}, {"structure": "mean"}, {"structure": "per_sample"}, {"curvature": "norm"}], ids=str
)
def test_gradients_at_the_end_of_float32_give_steps_within_it(features: int, options: dict[str, Any]) -> None:
    y = torch.zeros(64, features, requires_grad=True)
    hook = npl.LossHook(**options)
    hook((y * 1e-43).sum()).backward()
    assert y.grad is not None
    assert bool(torch.isfinite(y.grad).all())
    assert bool((y.grad > 0).all())


def test_gradients_that_are_rounding_are_not_brought_to_length_one() -> None:
    hook, w = npl.LossHook(curvature="norm"), torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    for size, expected in ((1.0, 1.0), (1e-3, 1.0), (1e-17, 0.0)):
        w.grad = None
        hook((size * (w * 1.0)).sum(-1).mean()).backward()
        length = float(4 * w.grad.norm(dim=-1).max())
        assert length == pytest.approx(expected, abs=0.05)
    again = npl.LossHook(curvature="norm")
    again.load_state_dict(hook.state_dict())
    w.grad = None
    again((1e-17 * (w * 1.0)).sum(-1).mean()).backward()
    assert float(4 * w.grad.norm(dim=-1).max()) < 1e-6


@pytest.mark.parametrize("structure", ["isotropic", "diagonal", "block"])
def test_a_structure_that_soft_normalisation_does_not_have_is_refused(structure: Any) -> None:
    with pytest.raises(npl.ArgumentError, match="structure must be 'auto' or 'per_sample' with curvature='norm'"):
        npl.LossHook(curvature="norm", structure=structure)
