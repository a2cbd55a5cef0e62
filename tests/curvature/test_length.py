"""The factor that makes the first steps as long as their gradients, and the size that follows the signal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from newton_plugin._curvature.length import Length
from newton_plugin._curvature.signal_size import SignalSize

NAN = math.nan


def number(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64)


def test_it_is_the_geometric_mean_of_the_first_twenty_ratios_and_then_stays() -> None:
    length = Length()
    g = torch.Generator().manual_seed(0)
    gradients, steps = torch.rand(30, generator=g, dtype=torch.float64), torch.rand(30, generator=g).double()
    logs: list[float] = []
    for t in range(30):
        found = length.update(gradients[t], steps[t])
        if t < 20:
            logs.append(math.log(float(gradients[t] / steps[t])) / 2)
        assert float(found) == pytest.approx(math.exp(sum(logs) / len(logs)), rel=1e-13)


@pytest.mark.parametrize("at", [0, 3, 25])
@pytest.mark.parametrize("bad", [(NAN, 1.0), (0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (math.inf, 1.0), (1.0, math.inf)])
def test_a_batch_without_a_length_does_not_count(at: int, bad: tuple[float, float]) -> None:
    length, other = Length(), Length()
    for t in range(28):
        if t == at:
            found = length.update(number(bad[0]), number(bad[1]))
            if t == 0:
                assert float(found) == 1
        a, b = number(1.0 + t), number(2.0 + t * t)
        torch.testing.assert_close(length.update(a, b), other.update(a, b), rtol=1e-14, atol=0)


def test_it_goes_on_from_its_state_and_from_an_explicit_one() -> None:
    length, explicit = Length(), Length()
    explicit.load_state_dict(explicit.initial_state(number(0.0)))
    for t in range(25):
        resumed = Length()
        resumed.load_state_dict(length.state_dict())
        a, b = number(1.0 + t), number(2.0 + t * t)
        want = length.update(a, b)
        assert torch.equal(resumed.update(a, b), want)
        assert torch.equal(explicit.update(a, b), want)


@pytest.mark.parametrize(("rho", "exponent"), [(0.0, 0.5), (0.25, 0.5), (0.4, 0.2), (0.5, 0.0), (1.0, 0.0)])
def test_the_size_is_a_power_of_s_while_the_share_of_signal_stays(rho: float, exponent: float) -> None:
    size = SignalSize()
    for s in (4.0, 1.0, 0.3, 7.0, 1e-12):
        found = size.update(number(s), number(rho))
        assert float(found) == pytest.approx((s / 4.0) ** exponent, rel=1e-12)


def test_it_follows_the_exponent_of_each_step_and_goes_on_from_its_state() -> None:
    size, explicit = SignalSize(), SignalSize()
    explicit.load_state_dict(explicit.initial_state(number(0.0)))
    log = 0.0
    s = [3.0, 1.0, 0.2, 0.5, 2.0]
    rho = [0.1, 0.3, 0.45, 0.9, 0.35]
    for t in range(5):
        if t:
            log += min(0.5, max(0.0, 1 - 2 * rho[t])) * math.log(s[t] / s[t - 1])
        resumed = SignalSize()
        resumed.load_state_dict(size.state_dict())
        found = size.update(number(s[t]), number(rho[t]))
        assert float(found) == pytest.approx(math.exp(log), rel=1e-13)
        assert torch.equal(explicit.update(number(s[t]), number(rho[t])), found)
        assert torch.equal(resumed.update(number(s[t]), number(rho[t])), found)


def test_a_state_of_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match="tensor"):
        SignalSize().load_state_dict({"z": 1.0})
    with pytest.raises(TypeError, match="tensors"):
        Length().load_state_dict({"mean": "much", "count": 1})
