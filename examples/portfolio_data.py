"""Weekly decisions on 20 US stocks, 1990-2022: what was known on the day, and what the next week returned.

The daily prices ship inside skfolio (``pip install skfolio``); nothing is downloaded. The 20 stocks were chosen by
people who knew that they would survive until 2022, so every absolute return is flattered: compare methods with each
other and with equal weights, never with the world.
"""

import csv
import gzip
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Part = Literal["train", "validation", "test"]
YEARS: dict[Part, tuple[int, int]] = {"train": (1990, 2010), "validation": (2011, 2015), "test": (2016, 2022)}
WEEK, YEAR = 5, 252  # trading days


@dataclass(frozen=True)
class Weeks:
    """K decision days in order: ``features`` (K, 20, 8), ``covariance`` (K, 20, 20) and ``returns`` (K, 20).

    Returns are simple, in percent, over the five days after the decision; covariances are of five days, in percent
    squared, from the year before it. Everything in ``features`` is a ratio to the stock's own past or a rank among
    the 20 stocks on that day.
    """

    features: Tensor
    covariance: Tensor
    returns: Tensor

    def __len__(self) -> int:
        return len(self.returns)


@cache
def load(part: Part) -> Weeks:
    """One decision every five trading days; a week belongs to the part in which it ends."""
    prices, years = _read()
    daily = prices[1:] / prices[:-1] - 1  # daily[t] is known at the close of day t + 1
    first, last = YEARS[part]
    days = torch.arange(YEAR, len(prices) - WEEK, WEEK)
    days = days[(years[days] >= first) & (years[days + WEEK] <= last)]
    past = torch.stack([daily[day - YEAR : day] for day in days])  # (K, 252, 20): up to and with the decision day
    return Weeks(_features(past), _covariance(100 * past), 100 * (prices[days + WEEK] / prices[days] - 1))


def _read() -> tuple[Tensor, Tensor]:
    """Prices (8313, 20) and the years (8313,): ``skfolio.datasets.load_sp500_dataset()`` without its import time."""
    package = find_spec("skfolio")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("The prices of this example are part of skfolio: pip install skfolio.")
    path = Path(package.origin).parent / "datasets" / "data" / "sp500_dataset.csv.gz"
    with gzip.open(path, "rt") as file:
        rows = list(csv.reader(file))[1:]
    return torch.tensor([[float(v) for v in r[1:]] for r in rows], dtype=torch.float64), torch.tensor(
        [int(r[0][:4]) for r in rows]
    )


def _features(past: Tensor) -> Tensor:
    """Past returns over a week, a month, a quarter and a year in deviations and in ranks: (K, 20, 8)."""
    deviation = past.std(1).clamp_min(1e-4)
    spans = (WEEK, 21, 63, YEAR)
    momentum = torch.stack([past[:, -s:].sum(1) / (deviation * s**0.5) for s in spans], -1)
    ranks = momentum.argsort(1).argsort(1).double() / (past.shape[-1] - 1) - 0.5
    return torch.cat([momentum.clamp(-4, 4), 2 * ranks], -1)


def _covariance(past: Tensor, shrinkage: float = 0.2) -> Tensor:
    """Of five days, a fifth of the way towards its diagonal."""
    centred = past - past.mean(1, keepdim=True)
    sample = WEEK * centred.mT @ centred / (past.shape[1] - 1)
    return (1 - shrinkage) * sample + shrinkage * torch.diag_embed(sample.diagonal(dim1=-2, dim2=-1))
