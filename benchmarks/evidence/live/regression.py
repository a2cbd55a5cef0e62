"""Regression by the mean squared error: clean targets, and targets with outliers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from benchmarks.evidence.data.images import Part
from benchmarks.evidence.live.task import r_squared
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

__all__ = ["Diabetes", "NoisyRegression", "student_t"]


def _perceptron(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))


def _squared_error(network: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    x, y = batch
    return nn.functional.mse_loss(network(x), y)


@dataclass(frozen=True)
class Diabetes:
    """scikit-learn's 442 patients, 10 inputs; the score is 100 R^2."""

    def network(self) -> nn.Module:
        return _perceptron(10)

    def training(self, seed: int) -> tuple[Tensor, ...]:
        return _patients("train")

    def loss(self, network: nn.Module, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
        return _squared_error(network, batch)

    def score(self, network: nn.Module, part: Part) -> Tensor:
        x, y = _patients(part)
        return r_squared(network(x), y)


@cache
def _patients(part: Part) -> tuple[Tensor, Tensor]:
    """(K, 10) and (K, 1), mean 0 and deviation 1 over the training part; shuffled once, by seed 0: 260 / 80 / 102."""
    inputs, targets = load_diabetes(return_X_y=True, scaled=False)
    x, y = torch.as_tensor(inputs), torch.as_tensor(targets).unsqueeze(-1)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    chosen = {"train": slice(0, 260), "validation": slice(260, 340), "test": slice(340, None)}
    train, wanted = order[chosen["train"]], order[chosen[part]]
    x, y = ((values[wanted] - values[train].mean(0)) / values[train].std(0) for values in (x, y))
    return x.float(), y.float()


@dataclass(frozen=True)
class NoisyRegression:
    """A smooth function of 8 normal inputs, two of them idle; the score is 100 R^2.

    Only the training targets have noise, drawn once for each run; validation and test targets are the function itself.

    Attributes:
        noise: what Student's t with two degrees of freedom (no variance) is multiplied by; the function's deviation
            is 1.
    """

    noise: float = 0.5

    def network(self) -> nn.Module:
        return _perceptron(8)

    def training(self, seed: int) -> tuple[Tensor, ...]:
        x, y = _function("train")
        return x, y + self.noise * student_t(len(y), torch.Generator().manual_seed(seed)).unsqueeze(-1)

    def loss(self, network: nn.Module, batch: tuple[Tensor, ...], generator: torch.Generator) -> Tensor:
        return _squared_error(network, batch)

    def score(self, network: nn.Module, part: Part) -> Tensor:
        x, y = _function(part)
        return r_squared(network(x), y)


def student_t(count: int, generator: torch.Generator) -> Tensor:
    """(count,) of Student's t with two degrees of freedom: a normal over the root of an exponential."""
    normal = torch.randn(count, dtype=torch.float64, generator=generator)
    exponential = -torch.log1p(-torch.rand(count, dtype=torch.float64, generator=generator))
    return (normal / exponential.clamp_min(1e-12).sqrt()).float()


@cache
def _function(part: Part) -> tuple[Tensor, Tensor]:
    """(K, 8) and (K, 1): 1,000 / 300 / 1,000 samples from seeds of their own."""
    count, seed = {"train": (1000, 0), "validation": (300, 1), "test": (1000, 2)}[part]
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    y = _smooth(x)
    train = y if part == "train" else _smooth(torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)))
    return x, (y - train.mean()) / train.std()


def _smooth(x: Tensor) -> Tensor:
    """(K, 8) -> (K, 1)."""
    a, b, c, d, e, f = x.unbind(-1)[:6]
    return ((1.5 * a).sin() + (b + c).tanh() + d * e / 2 + f.cos()).unsqueeze(-1)
