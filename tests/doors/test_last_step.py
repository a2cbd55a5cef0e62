"""What a hook shows of its last step, as tensors: against the definitions of docs/when-it-helps.md, written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import newton_plugin as npl

RULES: list[dict[str, Any]] = [{"structure": "isotropic"}, {"structure": "mean"}, {"structure": "gated"}]


def hooked(hook: npl.LossHook, samples: int = 24, seed: int = 0, ignored: int = 0) -> Tensor:
    """One step; returns the per-sample gradients (N, m), by the formula of softmax."""
    torch.manual_seed(seed)
    model, x = nn.Linear(5, 4).double(), 3 * torch.randn(samples, 5, dtype=torch.float64)
    target = torch.randint(0, 4, (samples,))
    target[:ignored] = -100
    y = model(x)
    hook(F.cross_entropy(y, target)).backward()
    gradient = y.softmax(-1).detach() - F.one_hot(target.clamp_min(0), 4)
    gradient[:ignored] = 0
    return gradient


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_gradients_and_sizes(rule: dict[str, Any]) -> None:
    hook = npl.LossHook(**rule)
    gradient = hooked(hook)
    (last,) = hook.last_steps
    assert last.samples == 24
    assert last.gradients is not None
    torch.testing.assert_close(last.gradients, gradient)
    torch.testing.assert_close(last.sizes, gradient.norm(dim=1))
    numbers = hook.diagnostics()
    assert float(last.gradient_square) == pytest.approx(numbers["gradient_norm"] ** 2)
    assert float(last.step_square) == pytest.approx(numbers["step_norm"] ** 2)
    assert float(last.gradient_square) == pytest.approx(float(gradient.square().sum(1).mean()))
    assert last.readings.keys() <= numbers.keys()
    assert (rule == {"structure": "gated"}) == ("gate" in last.readings)


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(1, 45), ignored=st.integers(0, 12), seed=st.integers(0, 1000))
def test_tail_is_the_share_of_a_tenth(samples: int, ignored: int, seed: int) -> None:
    hook = npl.LossHook()
    ignored = min(ignored, samples - 1)
    gradient = hooked(hook, samples, seed, ignored)[ignored:]
    squared = gradient.square().sum(1).sort(descending=True).values
    (last,) = hook.last_steps
    if len(squared) < 10:
        assert last.tail.isnan()
    else:
        assert float(last.tail) == pytest.approx(float(squared[: len(squared) // 10].sum() / squared.sum()))


@pytest.mark.parametrize("samples", [3, 24])
def test_the_second_moment_has_the_eigenvalues_of_fishers_matrix(samples: int) -> None:
    """With fewer samples than features it is the smaller of the two matrices."""
    hook = npl.LossHook()
    gradient = hooked(hook, samples)
    moment = hook.last_steps[0].second_moment
    assert moment is not None
    assert moment.shape == (min(samples, 4),) * 2
    expected = torch.linalg.eigvalsh(gradient.mT @ gradient / samples)[-min(samples, 4) :]
    torch.testing.assert_close(torch.linalg.eigvalsh(moment), expected, atol=1e-12, rtol=1e-9)


def test_wide_outputs_have_no_second_moment_and_large_ones_no_gradients() -> None:
    wide, large = npl.LossHook(structure="isotropic"), npl.LossHook(structure="isotropic")
    wide(nn.Linear(2, 200)(torch.randn(150, 2)).square().mean()).backward()
    assert wide.last_steps[0].second_moment is None
    assert wide.last_steps[0].sizes is not None
    large(nn.Linear(2, 2048)(torch.randn(512, 2)).square().mean()).backward()
    (last,) = large.last_steps
    assert last.gradients is last.sizes is last.second_moment is None
    assert last.tail.isnan()
    assert float(last.gradient_square) == pytest.approx(large.diagnostics()["gradient_norm"] ** 2, rel=1e-5)


def test_a_gradient_that_is_not_finite_counts_as_its_own_step() -> None:
    hook = npl.LossHook()
    hook((nn.Linear(3, 2)(torch.randn(12, 3)) * torch.tensor([1.0, torch.inf])).square().mean()).backward()
    assert hook.last_steps[0].step_square.isnan() or hook.last_steps[0].step_square.isinf()
    assert hook.fallbacks == 1 == hook.diagnostics()["fallbacks"]


def test_nothing_before_the_first_step() -> None:
    assert npl.LossHook().last_steps == ()
    hook = npl.LossHook()
    hook(nn.Linear(3, 2)(torch.randn(12, 3)).square().mean())
    assert hook.last_steps == (), "the backward pass makes the step"


def test_of_several_boundaries_each_has_its_own() -> None:
    trunk, heads = nn.Linear(3, 4), nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 5)])
    hook = npl.LossHook(module=nn.ModuleList([trunk, heads]))
    h = trunk(torch.randn(12, 3)).tanh()
    hook(sum((head(h).square().mean() for head in heads), torch.zeros(()))).backward()
    assert [(last.name, last.second_moment.shape) for last in hook.last_steps if last.second_moment is not None] == [
        (found.name, (found.features,) * 2) for found in hook.boundaries
    ]
