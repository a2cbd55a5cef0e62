"""The portfolio example: decisions are optimal and feasible, nothing looks ahead, and every method trains."""

from importlib.util import find_spec
from itertools import pairwise

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("skfolio") is None, reason="the prices are part of skfolio")

from examples import portfolio, portfolio_data  # noqa: E402


@pytest.fixture(scope="module")
def weeks():
    return portfolio_data.load("validation")


def test_weights_are_feasible_and_the_best(weeks):
    generator = torch.Generator().manual_seed(0)
    forecast = torch.randn(len(weeks), 20, dtype=torch.float64, generator=generator)
    weights = portfolio.allocate(forecast, weeks.covariance)
    assert torch.allclose(weights.sum(-1), torch.ones(len(weeks), dtype=torch.float64), atol=1e-12)
    assert weights.min() > -1e-12
    assert weights.max() < portfolio.CAP + 1e-12
    best = portfolio.utility(weights, forecast, weeks.covariance)
    for _ in range(20):  # any other feasible portfolio: equal weights moved towards five stocks at the cap
        corner = torch.rand(len(weeks), 20, generator=generator).argsort(-1) < 5
        other = 0.7 * weights + 0.3 * portfolio.CAP * corner
        assert (portfolio.utility(other, forecast, weeks.covariance) <= best + 1e-12).all()


def test_gradient_of_the_decision_is_that_of_finite_differences(weeks):
    generator = torch.Generator().manual_seed(1)
    forecast = (0.1 * torch.randn(1, 20, dtype=torch.float64, generator=generator)).requires_grad_()
    rest = weeks.returns[:1], weeks.covariance[:1]
    gradient = torch.autograd.grad(portfolio.decision_loss(forecast, *rest), forecast)[0]
    assert gradient.abs().max() > 0.01
    for i in range(20):
        move = torch.zeros_like(forecast)
        move[0, i] = 1e-5
        up, down = (portfolio.decision_loss(forecast.detach() + s * move, *rest) for s in (1, -1))
        assert ((up - down) / 2e-5 - gradient[0, i]).abs() < 1e-8 * gradient.abs().max()


def test_perfect_forecasts_have_no_regret_and_others_have(weeks):
    perfect = portfolio.evaluate(portfolio.allocate(weeks.returns, weeks.covariance), "validation")
    assert perfect["regret"].abs().max() < 1e-10
    least = portfolio.evaluate(portfolio.allocate(torch.zeros_like(weeks.returns), weeks.covariance), "validation")
    assert (least["regret"] > -1e-10).all()
    assert least["regret"].mean() > 1


def test_costs_are_those_of_the_trades(weeks):
    """Holding one stock costs its purchase, and nothing afterwards."""
    weights = torch.zeros_like(weeks.returns)
    weights[:, 3] = 1
    result = portfolio.evaluate(weights, "validation")
    assert result["turnover"].abs().max() < 1e-12
    expected = weeks.returns[:, 3].clone()
    expected[0] -= 100 * portfolio.COST
    assert torch.allclose(result["net"], expected)


def test_nothing_known_on_the_day_depends_on_later_prices(monkeypatch):
    """With other prices after the middle of the test years, only later decisions differ."""
    load = portfolio_data.load.__wrapped__
    before = load("test")
    prices, years = portfolio_data._read()
    first = int((years >= 2016).nonzero()[0])
    change = first + 600
    altered = prices.clone()
    altered[change:] *= 1 + torch.rand(altered[change:].shape, dtype=torch.float64)
    monkeypatch.setattr(portfolio_data, "_read", lambda: (altered, years))
    after = load("test")
    same = (before.features == after.features).flatten(1).all(-1)
    known = (first + portfolio_data.WEEK * torch.arange(len(before)) + portfolio_data.WEEK) < change
    assert same[known].all()
    assert (before.covariance == after.covariance).flatten(1).all(-1)[known].all()
    assert not same[-1]


def test_parts_follow_each_other_in_time():
    sizes = {part: len(portfolio_data.load(part)) for part in portfolio_data.YEARS}
    assert sizes == {"train": 1008, "validation": 251, "test": 351}
    bounds = list(portfolio_data.YEARS.values())
    assert all(a[1] < b[0] for a, b in pairwise(bounds))


@pytest.mark.parametrize("method", portfolio.LOSSES)
def test_every_method_trains(method):
    network = portfolio.train(method, seed=0, learning_rate=1e-2, steps=3)
    assert all(torch.isfinite(p).all() for p in network.parameters())
    assert network[2].weight.abs().max() > 1e-3  # it began at zero


def test_the_script_prints_a_table(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["portfolio", "--method", "Newton, Fisher", "--steps", "2"])
    portfolio.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:15].strip() for line in lines[1:]] == ["equal weights", "least variance", "Newton, Fisher"]
