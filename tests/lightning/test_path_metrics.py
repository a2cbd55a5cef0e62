"""PathAccuracy and CostRatio against the definitions, map by map."""

from __future__ import annotations

import doctest
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import newton_plugin as npl
from newton_plugin.algorithms import shortest_path
from newton_plugin_lightning import CostRatio, PathAccuracy, _path_metrics


def problems(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Paths by a disturbed and by the true costs, and the true costs."""
    g = torch.Generator().manual_seed(seed)
    costs = torch.rand(count, 5, 4, generator=g) + 0.1
    noisy = costs + 0.2 * torch.rand(count, 5, 4, generator=g)
    return shortest_path(noisy).path, shortest_path(costs).path, costs


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(1, 12), st.integers(0, 10**6), st.integers(1, 5))
def test_the_definitions_whatever_the_batches(count: int, seed: int, batch: int) -> None:
    paths, best, costs = problems(count, seed)
    right = [a == b for a, b in zip(paths.tolist(), best.tolist(), strict=True)]
    triples = zip(paths.double(), best.double(), costs.double(), strict=True)
    ratios = [((c * p).sum() / (c * b).sum()).item() for p, b, c in triples]
    accuracy, ratio = PathAccuracy(), CostRatio()
    for p, b, c in zip(paths.split(batch), best.split(batch), costs.split(batch), strict=True):
        accuracy.update(p, b)
        ratio.update(p, b, c)
    assert accuracy.compute().item() == pytest.approx(sum(right) / count)
    assert ratio.compute().item() == pytest.approx(sum(ratios) / count, rel=1e-5)
    assert ratio.compute() >= 1 - 1e-6


def test_a_tie_is_wrong_by_name_and_right_by_cost() -> None:
    costs = torch.tensor([[[1.0, 2.0, 9.0], [9.0, 9.0, 1.0]], [[1.0, 2.0, 9.0], [2.0, 9.0, 1.0]]])
    best = torch.tensor([[[1, 1, 0], [0, 0, 1]]] * 2)
    other = torch.tensor([[[1, 1, 0], [0, 0, 1]], [[1, 0, 0], [1, 1, 1]]])
    assert PathAccuracy()(other, best).item() == 0.5
    costs[1, 1, 1] = 0.0  # then the detour costs the same
    assert CostRatio()(other, best, costs).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float64])
def test_any_dtype_of_indicator(dtype: torch.dtype) -> None:
    paths, best, costs = problems(20, 0)
    assert PathAccuracy()(paths.to(dtype), best) == PathAccuracy()(paths, best)
    assert CostRatio()(paths.to(dtype), best.to(dtype), costs) == CostRatio()(paths, best, costs)


def test_edges_soft_paths_and_free_paths() -> None:
    edges = torch.tensor([[1.0, 0.0, 1.0]])
    assert PathAccuracy()(edges, edges.long()).item() == 1
    assert PathAccuracy()(0.99 * edges, edges).item() == 0
    free = torch.zeros(1, 3)
    assert CostRatio()(1 - edges, edges, free).item() == 1
    assert CostRatio()(1 - edges, edges, 1 - edges).item() == math.inf


def test_reset_and_directions() -> None:
    metric = PathAccuracy()
    metric.update(torch.ones(3, 2), torch.ones(3, 2))
    metric.reset()
    metric.update(torch.zeros(1, 2), torch.ones(1, 2))
    assert metric.compute() == 0
    assert PathAccuracy.higher_is_better
    assert CostRatio.higher_is_better is False


@pytest.mark.parametrize(
    ("metric", "arguments", "error", "message"),
    [
        (PathAccuracy, (torch.ones(2, 3), torch.ones(2, 4)), npl.ShapeError, r"paths and targets must have one shape"),
        (PathAccuracy, (torch.ones(2), torch.ones(2)), npl.ShapeError, r"got \(2,\), \(2,\).*needs \.unsqueeze\(0\)"),
        (PathAccuracy, ([[1]], torch.ones(1, 1)), npl.ArgumentTypeError, r"paths must be a torch\.Tensor; got list"),
        (CostRatio, (torch.ones(2, 3), torch.ones(2, 3), None), npl.ArgumentTypeError, r"costs must be a torch\.Tenso"),
        (CostRatio, (torch.ones(2, 3),) * 2 + (torch.ones(3, 2),), npl.ShapeError, r"costs must have one shape"),
    ],
)
def test_refusals(metric: Any, arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        metric().update(*arguments)


def test_the_examples_in_the_docstrings() -> None:
    failed, attempted = doctest.testmod(_path_metrics)
    assert attempted > 5
    assert failed == 0
