"""A vector is one problem or many of one number: every black box refuses it, and names both ways to say which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from newton_plugin import ArgumentTypeError, ShapeError
from newton_plugin.algorithms import FenchelYoungLoss, PerturbedOptimizer, StochasticSmoothing

GUMBEL: dict[str, Any] = {"samples": 200_000, "sigma": 1.0, "noise": "gumbel"}


def highest(scores: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1])


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def smoothing(y: Tensor) -> Tensor:
    return StochasticSmoothing(highest, **GUMBEL, generator=_seeded())(y)


def perturbed(y: Tensor) -> Tensor:
    return PerturbedOptimizer(highest, **GUMBEL, generator=_seeded())(y)


def fenchel_young(y: Tensor) -> Tensor:
    return FenchelYoungLoss(highest, **GUMBEL, generator=_seeded())(y, torch.zeros_like(y))


BOXES: list[Callable[[Tensor], Tensor]] = [smoothing, perturbed, fenchel_young]
every_box = pytest.mark.parametrize("box", BOXES)


@every_box
def test_a_vector_is_refused(box: Callable[[Tensor], Tensor]) -> None:
    two = r"One problem of 3 numbers is y\.unsqueeze\(0\); 3 problems of one number each are y\.unsqueeze\(-1\)"
    with pytest.raises(ShapeError, match=rf"two dimensions or more; got \(3,\)\. {two}"):
        box(torch.zeros(3))
    with pytest.raises(ShapeError, match=r"got \(0,\)"):
        box(torch.zeros(0))
    with pytest.raises(ShapeError, match=r"got \(\)\. One problem of one number is y\.reshape\(1, 1\)"):
        box(torch.tensor(1.0))


@every_box
def test_so_is_the_row_that_vmap_makes(box: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ShapeError, match=r"unsqueeze\(0\)"):
        torch.func.vmap(box, randomness="same")(torch.zeros(2, 3))
    mapped = torch.func.vmap(lambda row: box(row.unsqueeze(0)), randomness="same")(torch.zeros(2, 3))
    assert mapped.isfinite().all()


def test_what_they_name_is_right() -> None:
    """One problem: the softmax, by Gumbel noise. Read as three problems of one number it would be ones."""
    y = torch.tensor([0.0, 1.0, 2.0])
    soft = torch.softmax(y, -1)
    for box in (smoothing, perturbed):
        torch.testing.assert_close(box(y.unsqueeze(0)), soft.unsqueeze(0), atol=0.005, rtol=0)
        torch.testing.assert_close(box(y.unsqueeze(-1)), torch.ones(3, 1))
    target = torch.tensor([[0.0, 1.0, 0.0]])
    loss = FenchelYoungLoss(highest, **GUMBEL, generator=_seeded())(y.unsqueeze(0), target)
    expected = torch.nn.functional.cross_entropy(y.unsqueeze(0), target)
    torch.testing.assert_close(loss, expected, atol=0.01, rtol=0)


def test_a_complex_target_is_refused() -> None:
    loss = FenchelYoungLoss(highest, samples=2, sigma=1.0)
    with pytest.raises(ArgumentTypeError, match=r"target must hold real solutions; got torch\.complex64"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3) + 0j)
