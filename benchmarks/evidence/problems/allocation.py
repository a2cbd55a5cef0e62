"""Decision-focused learning: forecasts trained through the quadratic program that uses them.

A perceptron reads a forecast from each asset's image (a two-digit number: its expected return), and a quadratic program
turns forecasts f into a portfolio: maximise f'w - risk/2 w'Sw over w >= 0, sum w = 1. Training sees what an
investor sees, the realised return (the number plus noise). Its loss is the regret of the decision. An asset that is not
held gets a gradient of exactly zero, and the loss is a different quadratic for each set of held assets.

The weekly prices of ``examples/portfolio_data.py`` are not used here. Nothing in them could be learned
(``results/portfolio.md``: equal weights are as good as every method), so they cannot tell arms apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from benchmarks.evidence.data.images import Part
from benchmarks.evidence.data.written_numbers import write_numbers
from benchmarks.evidence.problems.problem import Batches, RowsLoss
from torch import Tensor, nn

from newton_plugin.convex import solve_qp

__all__ = ["Allocation", "allocate", "utility"]

RISK, CORRELATION, NOISE = 4.0, 0.3, 0.3
_DIGITS = 2


@dataclass(frozen=True)
class Allocation:
    """Portfolios of ``assets`` assets with volatilities from .3 to .9.

    Attributes:
        noise: standard deviation of a realised return; expected ones are uniform on [0, 1).
        folder: with MNIST; None: scikit-learn's digits.
    """

    name: str
    title: str
    assets: int = 8
    noise: float = NOISE
    table: str = "beyond"
    steps: int = 500
    batch: int = 32
    folder: str | None = None
    sharpnesses: tuple[float, ...] = ()
    optimizer: Literal["adam", "sgd"] = "adam"
    without: tuple[str, ...] = ("plain, textbook",)

    def network(self) -> nn.Module:
        pixels = _DIGITS * (64 if self.folder is None else 784)
        layers = [nn.Linear(pixels, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1)]
        return nn.Sequential(nn.Flatten(-2), *layers, nn.Flatten(-2))

    def batches(self, seeds: Sequence[int], batch: int, steps: int) -> Batches:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for _ in range(steps):
            images, returns = [], []
            for g in generators:
                seen, expected = _days("train", batch, self.assets, g, self.folder)
                images.append(seen)
                returns.append(expected + self.noise * torch.randn(expected.shape, generator=g, dtype=torch.float32))
            yield torch.stack(images), torch.stack(returns)

    def held_out(self, part: Part) -> tuple[Tensor, Tensor]:
        return _held_out(part, self.assets, self.folder)

    def loss(self, sharpness: float | None, seeds: Sequence[int], textbook: bool) -> RowsLoss:
        return regret

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """How much of what a perfect forecast gains over equal weights is gained, by expected returns.

        1: the best decision. 0: as good as equal weights, which ask for no forecast, or worse: a loss is not counted
        beyond that, so that one day cannot outweigh the others.
        """
        returns = targets.to(outputs.dtype).expand(outputs.shape)
        equal = utility(torch.full_like(returns, 1 / self.assets), returns)
        attainable = utility(allocate(returns), returns) - equal
        gained = utility(allocate(outputs.nan_to_num()), returns) - equal
        return (gained / attainable.clamp_min(1e-9)).nan_to_num(0.0).clamp(0, 1).double()


def allocate(forecasts: Tensor) -> Tensor:
    """Forecasts (..., n) to weights (..., n), the covariance being the same on all days."""
    n = forecasts.shape[-1]
    eye, one = torch.eye(n, dtype=forecasts.dtype), forecasts.new_ones(1)
    covariance = RISK * _covariance(n).to(forecasts.dtype)
    # A forecast beyond all bounds has no solution: NaN, which ends that replica and no other.
    return solve_qp(covariance, -forecasts, one.expand(1, n), one, -eye, one.new_zeros(n), on_failure="nan").x


def utility(weights: Tensor, returns: Tensor) -> Tensor:
    """(...): the return less the penalty for risk."""
    covariance = _covariance(weights.shape[-1]).to(weights.dtype)
    return (weights * returns).sum(-1) - RISK / 2 * ((weights @ covariance) * weights).sum(-1)


def regret(forecasts: Tensor, returns: Tensor) -> Tensor:
    """What the decision falls short of the best that these returns allow: (M, n), (M, n) -> (M,)."""
    returns = returns.to(forecasts.dtype)
    with torch.no_grad():
        best = utility(allocate(returns), returns)
    return best - utility(allocate(forecasts), returns)


@cache
def _covariance(n: int) -> Tensor:
    volatility = torch.linspace(0.3, 0.9, n, dtype=torch.float64)
    correlation = CORRELATION + (1 - CORRELATION) * torch.eye(n, dtype=torch.float64)
    return volatility.unsqueeze(-1) * correlation * volatility


def _days(part: Part, count: int, assets: int, generator: torch.Generator, folder: str | None) -> tuple[Tensor, Tensor]:
    images, numbers = write_numbers(part, (count, assets), _DIGITS, generator, folder)
    return images, numbers.float() / 10**_DIGITS


@cache
def _held_out(part: Part, assets: int, folder: str | None) -> tuple[Tensor, Tensor]:
    seed = {"validation": 1, "test": 2}[part]
    return _days(part, 500, assets, torch.Generator().manual_seed(seed), folder)
