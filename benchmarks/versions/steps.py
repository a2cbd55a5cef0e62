"""Newton steps: door x curvature x structure x power x damping x dtype x reduction x problem.

Of two problems the whole product in float64; of all others and in every dtype a sample of it, from a fixed seed.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import torch
from benchmarks.versions.case import Case, Record
from benchmarks.versions.doors import DOORS, Reduction
from benchmarks.versions.problems import PROBLEMS
from benchmarks.versions.settings import DAMPINGS, DTYPES, REDUCTIONS, RULES, arguments

__all__ = ["cases"]

_WHOLE = ("sequence", "indefinite_9x4")  # problems with the whole product of curvature, structure, power and damping
_SAMPLED = {"small": 4000, "large": 250, "huge": 40}
_DTYPE_WEIGHTS = (6, 2, 1, 1)  # most of the sample in float64, whose differences show most

Setting = tuple[str, str, str, float, str, str, Reduction, str, str]


def cases() -> list[Case]:
    """All of them, each once."""
    return [_case(setting) for setting in dict.fromkeys(itertools.chain(_product(), _sample()))]


def _product() -> Iterator[Setting]:
    for rule, damping, door, problem in itertools.product(RULES, DAMPINGS, DOORS, _WHOLE):
        yield door, *rule, damping, "float64", "mean", "small", problem


def _sample() -> Iterator[Setting]:
    chosen = random.Random(20)
    for size, count in _SAMPLED.items():
        problems = list(PROBLEMS[size])
        # One matrix of all of 8,200 features takes a minute.
        rules = [rule for rule in RULES if size != "huge" or rule[1] != "block"]
        for k in range(count):
            yield (
                chosen.choice(list(DOORS)),
                *chosen.choice(rules),
                chosen.choice(list(DAMPINGS)),
                chosen.choices(list(DTYPES), _DTYPE_WEIGHTS)[0],
                chosen.choice(REDUCTIONS),
                size,
                problems[k % len(problems)],
            )


def _case(setting: Setting) -> Case:
    door, curvature, structure, power, damping, dtype, reduction, size, problem = setting

    def body(record: Record) -> None:
        built = PROBLEMS[size][problem](DTYPES[dtype], reduction)
        built.model.to(torch.float32 if built.autocast else DTYPES[dtype])
        DOORS[door](record, built, reduction, arguments(curvature, structure, power, damping))

    rule = f"{curvature}, structure {structure}, power {power:g}, damping {damping}"
    return Case("steps", f"{door}, {problem}, {rule}, {dtype}, {reduction}", body)
