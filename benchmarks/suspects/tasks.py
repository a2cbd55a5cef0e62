"""The tasks: fixed training sets, a share of whose targets is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from benchmarks.evidence.data.number_lists import NumberLists
from benchmarks.evidence.problems.classification import NEIGHBOURS, Classification
from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.problems.ranking import Ranking
from benchmarks.evidence.problems.registry import problems
from torch import Tensor

__all__ = ["COUNT", "DOSES", "TASKS", "Data", "Task"]

COUNT = 1000
"""Samples of a training set."""
DOSES = (5, 10, 30)
"""Per cent of them that are given a wrong target."""


class Data(NamedTuple):
    """inputs (K, ...), targets (K, ...) as a training sees them, wrong (K,): whose target is not the true one."""

    inputs: Tensor
    targets: Tensor
    wrong: Tensor


@dataclass(frozen=True)
class Task:
    """A problem of the evidence with a training set that stays.

    Attributes:
        name, title: for lines and for the table.
        of: the problem's name.
        corrupt: from the true targets (K, ...) and a generator to a wrong one for each.
        sharpness: of the loss; None if it has none.
    """

    name: str
    title: str
    of: str
    corrupt: Callable[[Tensor, torch.Generator], Tensor]
    sharpness: float | None = None

    @property
    def problem(self) -> Problem:
        return _problems()[self.of]

    @property
    def has_classes(self) -> bool:
        """Whether outputs are scores of classes, and targets labels."""
        return isinstance(self.problem, Classification)

    def draw(self, dose: int, seed: int, count: int = COUNT) -> Data:
        """The set of one seed. What is wrong at a lower dose is wrong at a higher one.

        A wrong target that is the true one by chance (an order, a path) does not count as wrong.
        """
        if isinstance(self.problem, Ranking):
            lists = NumberLists("train", self.problem.n, self.problem.digits)
            inputs, true = next(iter(lists.draw(1, count, seed)))
        else:
            inputs, true = (part[:count] for part in self.problem.held_out("train"))
        generator = torch.Generator().manual_seed(seed + 10**6)
        chosen = torch.zeros(count, dtype=torch.bool)
        chosen[torch.randperm(count, generator=generator)[: round(count * dose / 100)]] = True
        given = self.corrupt(true, generator)
        targets = torch.where(chosen.reshape(-1, *[1] * (true.ndim - 1)), given, true)
        return Data(inputs, targets, (targets != true).reshape(count, -1).any(1))


@cache
def _problems() -> dict[str, Problem]:
    return problems()


def _other_label(labels: Tensor, generator: torch.Generator) -> Tensor:
    return (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10


def _neighbour(labels: Tensor, generator: torch.Generator) -> Tensor:
    return torch.tensor(NEIGHBOURS)[labels]


def _random_order(ranks: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(ranks.shape, generator=generator).argsort(-1)


def _path_of_another(paths: Tensor, generator: torch.Generator) -> Tensor:
    count = len(paths)
    return paths[(torch.arange(count) + torch.randint(1, count, (count,), generator=generator)) % count]


TASKS = {
    task.name: task
    for task in (
        Task("labels", "labels, another class", "wrong_labels", _other_label),
        Task("neighbours", "labels, the neighbour's class", "wrong_labels", _neighbour),
        Task("lists", "lists of 5, a random order", "wrong_lists", _random_order, 0.1),
        Task("fenchel_young", "paths of other maps, Fenchel-Young", "fenchel_young_3", _path_of_another),
        Task("for_l2", "paths of other maps, Bellman-Ford for, L2", "for_l2", _path_of_another, 12.0),
    )
}
