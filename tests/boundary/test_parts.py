"""Lists that a loss takes one by one: each is a sample, though its rows are counted. That is said, of no other loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.boundary.explicit import linear
from torch import Tensor

from newton_plugin import algorithms
from newton_plugin._boundary.search import BoundarySearch

G = torch.Generator().manual_seed(0)
LENGTHS = [4, 7, 3, 5, 6, 4, 5, 3]
X = torch.randn(sum(LENGTHS), 5, generator=G, dtype=torch.float64)
CLASSES = torch.arange(len(X)) % 3
LISTS = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
STARTS = torch.tensor(LENGTHS).cumsum(0) - torch.tensor(LENGTHS)
SCORER, CLASSIFIER = linear(5, 1), linear(5, 3)


def listwise(scores: Tensor) -> Tensor:
    return -scores.flatten().log_softmax(0)[0]


def pairwise(scores: Tensor) -> Tensor:
    s = scores.flatten()
    return F.softplus(s - s[:, None]).triu(1).sum()


def sorted_first(scores: Tensor) -> Tensor:
    return F.relu(1 - scores.flatten().sort().values.diff()).mean()


def ranked(scores: Tensor) -> Tensor:
    return algorithms.soft_rank(scores.flatten()[None], temperature=0.1).square().mean()


def total(loss: Callable[[Tensor], Tensor], parts: list[Tensor]) -> Tensor:
    return torch.stack([loss(part) for part in parts]).mean()


def scores() -> Tensor:
    return SCORER(X)


FOUND: dict[str, Callable[[], Tensor]] = {
    **{
        f"split, {loss.__name__}": lambda loss=loss: total(loss, list(scores().split(LENGTHS)))
        for loss in (listwise, pairwise, sorted_first, ranked)
    },
    "split after a squeeze and an activation": lambda: total(
        listwise, list(scores().squeeze(-1).tanh().split(LENGTHS))
    ),
    "a sum in a loop": lambda: sum((listwise(part) for part in scores().split(LENGTHS)), torch.zeros(())) / 8,
    "by mask": lambda: total(listwise, [s[k == LISTS] for s in [scores()] for k in range(8)]),
    "by slice": lambda: total(
        listwise, [s[a : a + n] for s in [scores()] for a, n in zip(STARTS.tolist(), LENGTHS, strict=True)]
    ),
    "one call for each": lambda: total(listwise, [SCORER(part) for part in X.split(LENGTHS)]),
    "one call for each, pairs": lambda: total(pairwise, [SCORER(part) for part in X.split(LENGTHS)]),
}


@pytest.mark.parametrize("name", FOUND)
def test_lists_are_noticed(name: str) -> None:
    cut = BoundarySearch("auto")(FOUND[name]())
    assert len(cut.parts) == 1
    assert "in 8 parts" in cut.parts[0]
    assert "37" in cut.parts[0]


def logits() -> Tensor:
    return CLASSIFIER(X)


def contrast(a: Tensor, b: Tensor) -> Tensor:
    return F.cross_entropy(a @ b.T, torch.arange(len(a)))


def per_class() -> Tensor:
    y = logits()
    return total(
        lambda part: F.cross_entropy(part, torch.zeros(len(part), dtype=torch.long)),
        [y[c == CLASSES] for c in range(3)],
    )


def batches(y: Tensor, n: int) -> Tensor:
    parts, labels = y.chunk(n), CLASSES.chunk(n)
    return sum((F.cross_entropy(a, b) for a, b in zip(parts, labels, strict=True)), torch.zeros(()))


def padded() -> Tensor:
    rows = torch.nn.utils.rnn.pad_sequence(list(scores().squeeze(-1).split(LENGTHS)), batch_first=True)
    return -rows.log_softmax(-1)[:, 0].mean()


SILENT: dict[str, Callable[[], Tensor]] = {
    "an ordinary loss": lambda: F.cross_entropy(logits(), CLASSES),
    "two parts": lambda: total(listwise, list(scores().split([20, 17]))),
    "two views": lambda: contrast(*logits()[:36].chunk(2)),
    "triplets": lambda: F.triplet_margin_loss(*logits()[:36].chunk(3)),
    "four views, pairs of them": lambda: torch.stack(
        [contrast(*v) for v in itertools.pairwise(logits()[:36].chunk(4))]
    ).sum(),
    "a loss for each class": per_class,
    "several batches in one": lambda: batches(logits(), 5),
    "several calls, one batch each": lambda: total(
        lambda part: F.cross_entropy(part, torch.zeros(len(part), dtype=torch.long)),
        [CLASSIFIER(part) for part in X.split(LENGTHS)],
    ),
    "mixed labels": lambda: 0.3 * F.cross_entropy(logits(), CLASSES) + 0.7 * F.cross_entropy(logits(), CLASSES.flip(0)),
    "lists of equal length": lambda: total(listwise, list(SCORER(X[:36]).view(9, 4).unbind(0))),
    "one padded batch": padded,
}


@pytest.mark.parametrize("name", SILENT)
def test_other_losses_are_not(name: str) -> None:
    cut = BoundarySearch("auto")(SILENT[name]())
    assert cut.boundaries
    assert cut.parts == []
