"""Noise against torch.distributions: densities, scores of first and second order, samples."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from torch import Tensor

from newton_plugin import _errors as errors
from newton_plugin.algorithms._black_box import noise as noise_module
from newton_plugin.algorithms._black_box.noise import EULER, Cauchy, Gaussian, Gumbel, resolve_noise

zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
CASES: dict[str, tuple[Any, torch.distributions.Distribution]] = {
    "gaussian": (Gaussian(), torch.distributions.Normal(zero, one)),
    "gumbel": (Gumbel(), torch.distributions.Gumbel(zero - EULER, one)),
    "cauchy": (Cauchy(), torch.distributions.Cauchy(zero, one)),
}
# The table of the module's docstring: s and s'.
SCORES = {
    "gaussian": (lambda e: e, lambda e: torch.ones_like(e)),
    "gumbel": (lambda e: 1 - torch.exp(-e - EULER), lambda e: torch.exp(-e - EULER)),
    "cauchy": (lambda e: 2 * e / (1 + e**2), lambda e: 2 * (1 - e**2) / (1 + e**2) ** 2),
}
every_noise = pytest.mark.parametrize("name", CASES)


def _draw(noise: Any, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return noise.sample(torch.empty(shape, dtype=dtype), torch.Generator().manual_seed(seed))


@every_noise
def test_ratio_of_densities(name: str) -> None:
    noise, distribution = CASES[name]
    e, shift = _draw(noise, 5, 4, 3), _draw(Gaussian(), 4, 3, seed=1)
    expected = (distribution.log_prob(e - shift) - distribution.log_prob(e)).sum(-1)
    torch.testing.assert_close(noise.log_ratio(e, shift), expected)
    assert (noise.log_ratio(e, torch.zeros_like(shift)) == 0).all()


@every_noise
def test_scores_of_first_and_second_order(name: str) -> None:
    """Of the ratio at shift 0, of the density by autograd, and of the table: three times the same."""
    noise, distribution = CASES[name]
    e = _draw(noise, 3)

    def ratio(shift: Tensor) -> Tensor:
        return noise.log_ratio(e.expand(1, 1, 3), shift.unsqueeze(0)).exp().squeeze()

    def density(point: Tensor) -> Tensor:
        return distribution.log_prob(point).sum()

    at = torch.zeros(3, dtype=torch.float64)
    first, second = torch.func.grad(ratio)(at), torch.func.hessian(ratio)(at)
    score, slope = -torch.func.grad(density)(e), -torch.func.hessian(density)(e)
    torch.testing.assert_close(first, score)
    torch.testing.assert_close(second, torch.outer(score, score) - slope)
    s, ds = SCORES[name]
    torch.testing.assert_close(s(e), score)
    torch.testing.assert_close(noise.score(e), score)
    torch.testing.assert_close(ds(e), slope.diagonal())


@every_noise
def test_weights_have_mean_zero(name: str) -> None:
    """By quadrature over the quantiles of the density, to the accuracy of the midpoint rule."""
    _, distribution = CASES[name]
    e = distribution.icdf((torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000)
    s, ds = SCORES[name]
    for weight in (s(e), s(e) ** 2 - ds(e)):
        assert abs(weight.mean()) < 2e-4


@every_noise
def test_samples_follow_the_density(name: str) -> None:
    """Kolmogorov-Smirnov, at a level of 1e-4; and the mean is zero where there is one."""
    noise, distribution = CASES[name]
    e = _draw(noise, 100_000).sort().values
    uniform = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    assert (distribution.cdf(e) - uniform).abs().max() < 2.23 / 100_000**0.5
    if noise.has_mean:
        assert abs(e.mean()) < 4 * e.std() / 100_000**0.5
    assert noise.symmetric == (name != "gumbel")


@every_noise
def test_a_seed_is_a_sample(name: str) -> None:
    noise, _ = CASES[name]
    assert torch.equal(_draw(noise, 2, 3), _draw(noise, 2, 3))
    assert not torch.equal(_draw(noise, 2, 3), _draw(noise, 2, 3, seed=1))
    assert _draw(noise, 4, dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e4, 1e18])
def test_no_tail_breaks_float32(size: float) -> None:
    """The furthest Cauchy sample that float32 draws, and the furthest of Gumbel's, 87 = -log(smallest float32)."""
    shift = torch.zeros(1, 2, requires_grad=True)
    for noise, e in ((Cauchy(), size), (Cauchy(), -size), (Gumbel(), min(size, 90.0))):
        ratio = torch.expm1(noise.log_ratio(torch.full((1, 1, 2), e), shift)).sum()
        (first,) = torch.autograd.grad(ratio, shift, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), shift)
        assert first.isfinite().all()
        assert second.isfinite().all()


def test_names_and_instances() -> None:
    mine = Gaussian()
    assert resolve_noise(mine) is mine
    assert [repr(resolve_noise(name)) for name in CASES] == ["Gaussian()", "Gumbel()", "Cauchy()"]
    with pytest.raises(errors.ArgumentError, match=r"noise must be one of 'gaussian', 'gumbel', 'cauchy'; got 'pink'"):
        resolve_noise("pink")
    for wrong in (Gaussian, 3, None):
        with pytest.raises(errors.ArgumentTypeError, match=r"noise must be one of .* or an object with symmetric"):
            resolve_noise(wrong)


def test_examples() -> None:
    assert doctest.testmod(noise_module).failed == 0
