"""What the examples of training loops share: a network that scores digits, and how many lists it ranks fully right."""

import torch
from torch import Tensor, nn

from examples.digit_lists import DigitLists
from newton_plugin.algorithms import RankingLoss

LENGTH = 5  # images in a list

ranking_loss = RankingLoss("neural_sort", temperature=0.1)


def scorer() -> nn.Module:
    """(B, n, 64) images -> (B, n) scores, always with the same weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(1))


def batches(steps: int) -> DigitLists:
    """``steps`` batches (images (32, n, 64), ranks (32, n))."""
    return DigitLists("train", LENGTH, batch_size=32, batches=steps, seed=0)


@torch.no_grad()
def report(model: nn.Module) -> None:
    """Print the share of test lists whose whole order is right."""
    images, ranks = next(iter(DigitLists("test", LENGTH, batch_size=1000, batches=1, seed=1)))
    found: Tensor = model(images).argsort(-1).argsort(-1)
    print(f"{(found == ranks).all(-1).double().mean():.1%} of {len(ranks)} test lists ranked fully right")
