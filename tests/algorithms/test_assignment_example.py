"""The example with scipy's linear_sum_assignment as black box: what it says of itself holds, and it runs."""

from __future__ import annotations

import argparse
import itertools

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from examples import assignment


def test_assignments_are_the_cheapest_permutations() -> None:
    costs = torch.rand(20, 4, 4, generator=torch.Generator().manual_seed(0))
    found = assignment.assign(costs)
    assert (found.sum(-1) == 1).all()
    assert (found.sum(-2) == 1).all()
    everyone = torch.stack([torch.eye(4)[list(p)] for p in itertools.permutations(range(4))])
    torch.testing.assert_close((costs * found).sum((1, 2)), torch.einsum("bij,pij->bp", costs, everyone).amin(-1))


def test_people_of_a_set_are_different_digits_with_the_costs_of_the_hidden_table() -> None:
    (images, costs, best), again = list(assignment.batches("validation", 2, 16, seed=1))
    assert images.shape == (16, 5, 64)
    assert not torch.equal(images, again[0])
    for matrix in costs:
        assert len({tuple(row.tolist()) for row in matrix}) == 5
    assert torch.equal(assignment.assign(costs), best)


def test_it_learns_and_says_what_it_measured(capsys: pytest.CaptureFixture[str]) -> None:
    perfect, excess = assignment.train(("Fenchel-Young", "score", None), 0, argparse.Namespace(steps=60, samples=4))
    assert perfect > 15  # chance: 1 in 120
    assert 0 < excess < 40
    assignment.main(["--seeds", "1", "--steps", "2", "--samples", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 + len(assignment.ARMS)
    assert all("(" in line for line in lines[5:])
