"""Decision-focused portfolio selection: train the forecast on the quality of the decision that it leads to.

A small network forecasts next week's return of each of 20 stocks; a quadratic program turns the forecasts m into
weights: maximise m'w - risk/2 w'Sw with sum w = 1 and 0 <= w <= cap, S the covariance of the past year.

"two-stage" fits the forecasts to the returns and never sees the program. "end to end" trains through it, on the
utility that the weights earned. The others add one line, ``NewtonLoss``: a Newton step on the forecasts.

    python -m examples.portfolio [--method "end to end"] [--steps 300]
"""

import argparse

import torch
from torch import Tensor, nn

import newton_plugin as npl
from examples.portfolio_data import Part, load
from newton_plugin.convex import solve_qp

RISK, CAP, COST = 0.1, 0.2, 0.001  # aversion (returns in percent a week), largest weight, cost of turning over 1


def allocate(forecast: Tensor, covariance: Tensor) -> Tensor:
    """Forecasts (N, 20), covariances (N, 20, 20) -> weights (N, 20)."""
    n = forecast.shape[-1]
    eye, one = torch.eye(n, dtype=forecast.dtype), forecast.new_ones(1)
    bounds = torch.cat([one.new_zeros(n), one.new_full((n,), CAP)])
    return solve_qp(RISK * covariance, -forecast, one.expand(1, n), one, torch.cat([-eye, eye]), bounds).x


def utility(weights: Tensor, returns: Tensor, covariance: Tensor) -> Tensor:
    """(N,): the week's return less the penalty for risk."""
    return (weights * returns).sum(-1) - RISK / 2 * torch.einsum("ni,nij,nj->n", weights, covariance, weights)


def decision_loss(forecast: Tensor, returns: Tensor, covariance: Tensor) -> Tensor:
    """Minus the utility of the weights that the forecasts lead to: regret up to a constant."""
    return -utility(allocate(forecast, covariance), returns, covariance).mean()


def forecast_loss(forecast: Tensor, returns: Tensor, _: Tensor) -> Tensor:
    return (forecast - returns).square().mean()


LOSSES = {
    "two-stage": lambda: forecast_loss,
    "end to end": lambda: decision_loss,
    "Newton, Fisher": lambda: npl.NewtonLoss(decision_loss, structure="mean"),
    "Newton, Hessian": lambda: npl.NewtonLoss(decision_loss, curvature="hessian"),
    "isotropic": lambda: npl.NewtonLoss(decision_loss, structure="isotropic"),
    "soft normalisation": lambda: npl.NewtonLoss(decision_loss, curvature="norm"),
}


def train(method: str, *, seed: int, learning_rate: float, steps: int = 300) -> nn.Sequential:
    """One network for all stocks, Adam on batches of 64 weeks of 1990-2010."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(-2)).double()
    nn.init.zeros_(network[2].weight)  # the first forecast is the same for all stocks: the portfolio of least variance
    optimizer = torch.optim.Adam(network.parameters(), learning_rate)
    loss_fn, weeks = LOSSES[method](), load("train")
    for i in torch.randint(len(weeks), (steps, 64)):
        optimizer.zero_grad()
        loss_fn(network(weeks.features[i]), weeks.returns[i], weeks.covariance[i]).backward()
        optimizer.step()
    return network


@torch.no_grad()
def evaluate(weights: Tensor, part: Part) -> dict[str, Tensor]:
    """Per week: regret against the weights of a perfect forecast, and the return net of costs."""
    weeks = load(part)
    perfect = utility(allocate(weeks.returns, weeks.covariance), weeks.returns, weeks.covariance)
    held = weights * (1 + weeks.returns / 100)  # what a week without trading makes of the weights
    turnover = (weights[1:] - held[:-1] / held[:-1].sum(-1, keepdim=True)).abs().sum(-1)
    net = (weights * weeks.returns).sum(-1) - 100 * COST * torch.cat([turnover.new_ones(1), turnover])
    return {"regret": perfect - utility(weights, weeks.returns, weeks.covariance), "net": net, "turnover": turnover}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", choices=LOSSES, nargs="+", default=list(LOSSES))
    parser.add_argument("--steps", type=int, default=300)
    options, weeks = parser.parse_args(), load("test")
    weights = {"equal weights": torch.full_like(weeks.returns, 1 / weeks.returns.shape[-1])}
    weights["least variance"] = allocate(torch.zeros_like(weeks.returns), weeks.covariance)
    for method in options.method:
        network = train(method, seed=0, learning_rate=1e-3, steps=options.steps)
        weights[method] = allocate(network(weeks.features), weeks.covariance)
    print("2016-22, one seed    regret (%/week)  net Sharpe (a year)")
    for name, w in weights.items():
        result = evaluate(w, "test")
        sharpe = result["net"].mean() / result["net"].std() * (252 / 5) ** 0.5
        print(f"{name:20}{result['regret'].mean():10.3f}{sharpe:22.2f}")


if __name__ == "__main__":
    main()
