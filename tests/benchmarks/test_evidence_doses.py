"""The table of doses: what is corrupted, how much of it, and that nothing else differs from what is varied."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from benchmarks.evidence.data.images import digit_images
from benchmarks.evidence.problems.classification import NEIGHBOURS
from benchmarks.evidence.problems.doses import DOSES
from benchmarks.evidence.problems.registry import problems
from torch import Tensor

EVERY: dict[str, Any] = dict(problems())
KINDS = {"lists": "wrong_lists", "labels": "wrong_labels", "paths": "fenchel_young_3", "grades": "ndcg_10"}
EQUAL = {
    "lists_30": "wrong_lists",
    "lists_00": "single_sharp",  # lists as these have none that is wrong
    "labels_30": "wrong_labels",
    "labels_00": "two_layers_adam",
    "paths_00": "fenchel_young_3",
    "grades_00": "ndcg_10",
}


def _batches(name: str, count: int = 3, seeds: tuple[int, ...] = (5, 6)) -> list[tuple[Tensor, Tensor]]:
    return list(EVERY[name].batches(seeds, 32, count))


def test_the_names() -> None:
    named = [f"{kind}_{dose:02d}" for kind in KINDS for dose in DOSES]
    named += [f"labels_neighbour_{dose}" for dose in DOSES[1:]]
    assert sorted(named) == sorted(name for name, p in EVERY.items() if p.table == "dose")
    assert not [p for p in problems("paper").values() if p.table == "dose"]
    assert len({EVERY[name].title for name in named}) == len(named)
    assert EVERY["ndcg_10"].table == "beyond"  # lists of ten, not a tenth of them


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_the_dose_differs(kind: str) -> None:
    base = EVERY[KINDS[kind]]
    for dose in DOSES:
        p = EVERY[f"{kind}_{dose:02d}"]
        same: dict[str, Any] = {"name": base.name, "title": base.title, "table": base.table}
        same |= {"random_labels": base.random_labels} if kind == "labels" else {"wrong": base.wrong}
        assert replace(p, **same) == base


@pytest.mark.parametrize("name", EQUAL)
def test_a_dose_that_another_problem_has_gives_its_batches(name: str) -> None:
    for ours, theirs in zip(_batches(name), _batches(EQUAL[name]), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("kind", KINDS)
def test_doses_show_the_same_inputs_and_as_much_is_wrong_as_said(kind: str) -> None:
    seeds = tuple(range(16))
    right = _batches(f"{kind}_00", 10, seeds)
    by_chance = {"lists": 1 / 120, "labels": 0.1, "paths": 0.0, "grades": 0.0}[kind]
    found = []
    for dose in DOSES:
        drawn = _batches(f"{kind}_{dose:02d}", 10, seeds)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(drawn, right, strict=True))
        other = torch.stack([(a[1] != b[1]).reshape(16, 32, -1).any(-1) for a, b in zip(drawn, right, strict=True)])
        found.append(float(other.double().mean()))
        assert found[-1] == pytest.approx(dose / 100 * (1 - by_chance), abs=0.03)
    assert all(more > less for less, more in pairwise(found))


def test_a_wrong_path_is_another_maps_and_stays_it() -> None:
    p = EVERY["paths_50"]
    tiles, paths = next(p.batches([5], 4000, 1))
    clean = next(EVERY["paths_00"].batches([5], 4000, 1))[1]
    known = {path.numpy().tobytes() for path in clean.flatten(0, 1)}
    assert {path.numpy().tobytes() for path in paths.flatten(0, 1)} <= known | {
        path.numpy().tobytes() for path in next(EVERY["paths_00"].batches([6], 20000, 1))[1].flatten(0, 1)
    }
    seen: dict[bytes, bytes] = {}
    for tile, path in zip(tiles[0], paths[0], strict=True):
        assert seen.setdefault(tile.numpy().tobytes(), path.numpy().tobytes()) == path.numpy().tobytes()
    assert 900 < len(seen) <= 1000


def test_wrong_grades_are_the_lists_own() -> None:
    for (_, drawn), (_, right) in zip(_batches("grades_50"), _batches("grades_00"), strict=True):
        assert torch.equal(drawn.sort(-1).values, right.sort(-1).values)


@pytest.mark.parametrize("dose", DOSES[1:])
def test_neighbours_come_in_pairs_and_take_the_same_images(dose: int) -> None:
    neighbours = torch.tensor(NEIGHBOURS)
    assert torch.equal(neighbours[neighbours], torch.arange(10))
    assert (neighbours != torch.arange(10)).all()
    for digit, other in ((3, 8), (4, 9), (1, 7), (5, 6), (0, 2)):
        assert NEIGHBOURS[digit] == other
    labels = digit_images("train").labels
    generators = [torch.Generator().manual_seed(9) for _ in range(2)]
    ours = EVERY[f"labels_neighbour_{dose}"]._labels(labels, generators[0])
    random = EVERY[f"labels_{dose}"]._labels(labels, generators[1])
    assert torch.equal(generators[0].get_state(), generators[1].get_state())  # the batches that follow are the same
    assert torch.equal(ours[ours != labels], neighbours[labels[ours != labels]])
    assert float((ours != labels).double().mean()) == pytest.approx(dose / 100, abs=0.04)
    assert ((random != labels) <= (ours != labels)).all()  # a label drawn anew may be right by chance
