"""The algorithms on the device: values, gradients and Hessians of a CPU, on the device of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.cuda.device import CPU, DEVICE, error, there
from torch import Tensor

import newton_plugin as npl
from newton_plugin.algorithms import (
    RankingLoss,
    SortingNetwork,
    average_precision_loss,
    ndcg_loss,
    neural_sort,
    relaxed_bellman_ford,
    shortest_path,
    shortest_path_graph,
    soft_rank,
    soft_sort,
    soft_top_k,
    spearman_loss,
)

G = torch.Generator().manual_seed(0)
SCORES = torch.randn(3, 5, generator=G, dtype=torch.float64)
COSTS = torch.rand(2, 4, 5, generator=G, dtype=torch.float64)
RANKS = torch.rand(3, 5, generator=G).argsort(-1)
RELEVANT = torch.tensor([[1, 0, 2, 0, 1], [0, 0, 1, 1, 0], [2, 1, 0, 0, 3]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
METHODS: dict[str, dict[str, Any]] = {
    "neural_sort": {"temperature": 0.7},
    "soft_sort": {"temperature": 0.7},
    "sorting_network": {"steepness": 3.0},
}

# From scores (or costs) on any device to numbers there.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "neural_sort": lambda s: neural_sort(s, temperature=0.7),
    "soft_sort": lambda s: soft_sort(s, temperature=0.7),
    "odd_even": lambda s: SortingNetwork(5, steepness=3.0).to(s.device)(s)[1],
    "bitonic": lambda s: SortingNetwork(5, layout="bitonic", steepness=3.0).to(s.device)(s)[1],
    "relaxed_bellman_ford": lambda s: relaxed_bellman_ford(s.square(), steepness=3.0),
}
for name, options in METHODS.items():
    FUNCTIONS |= {
        f"RankingLoss {name}": lambda s, n=name, o=options: RankingLoss(n, **o)(s, RANKS.to(s.device)),  # type: ignore[arg-type]
        f"RankingLoss {name}, mask": lambda s, n=name, o=options: RankingLoss(n, **o)(  # type: ignore[arg-type]
            s, RANKS.to(s.device), MASK.to(s.device)
        ),
        f"soft_rank {name}": lambda s, n=name, o=options: soft_rank(s, n, **o),
        f"spearman_loss {name}": lambda s, n=name, o=options: spearman_loss(s, RANKS.to(s.device), n, **o),
        f"soft_top_k {name}": lambda s, n=name, o=options: soft_top_k(s, 2, n, **o),
        f"ndcg_loss {name}": lambda s, n=name, o=options: ndcg_loss(s, RELEVANT.to(s.device), n, **o),
        f"average_precision {name}": lambda s, n=name, o=options: average_precision_loss(
            s, (RELEVANT > 0).to(s.device), n, **o
        ),
    }


def derivatives(function: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Value, gradient and Hessian of a weighted sum."""
    x = x.clone().requires_grad_()
    value = function(x)
    assert value.device == x.device
    assert value.dtype == x.dtype
    # No sum of a part for rows and one for columns: a soft permutation would turn that into a constant.
    weights = torch.linspace(0.5, 9.5, value.numel(), dtype=torch.float64).sin().to(x).reshape(value.shape)
    (gradient,) = torch.autograd.grad((value * weights).sum(), x)
    hessian = torch.autograd.functional.hessian(lambda v: (function(v) * weights).sum(), x.detach())
    assert isinstance(hessian, Tensor)
    return [value, gradient, hessian]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_gradients_and_hessians(name: str) -> None:
    x = COSTS if name == "relaxed_bellman_ford" else SCORES
    ours, theirs = derivatives(FUNCTIONS[name], there(x)), derivatives(FUNCTIONS[name], x)
    assert all(part.device == DEVICE for part in ours)
    assert max(map(error, ours, theirs)) <= 1e-9


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float32(name: str) -> None:
    x = (COSTS if name == "relaxed_bellman_ford" else SCORES).float()
    ours, theirs = FUNCTIONS[name](there(x)), FUNCTIONS[name](x)
    assert ours.dtype == torch.float32
    assert error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("structure", ["mean", "per_sample"])
@pytest.mark.parametrize("name", [f"RankingLoss {method}" for method in METHODS])
def test_newton_steps_of_ranking_losses(name: str, structure: str) -> None:
    taken = [
        npl.newton_step(FUNCTIONS[name], x.clone().requires_grad_(), curvature="hessian", structure=structure).step  # type: ignore[arg-type]
        for x in (there(SCORES), SCORES)
    ]
    assert taken[0].device == DEVICE
    assert error(*taken) <= 1e-9


@pytest.mark.parametrize("backend", ["auto", "torch", "numba"])
def test_shortest_paths(backend: str) -> None:
    """Computed on the device by "auto"; copied to the CPU and back by "numba"."""
    if backend == "numba":
        pytest.importorskip("numba")
    for dtype in (torch.float64, torch.float32):
        ours = shortest_path(there(COSTS.to(dtype)), backend=backend)
        theirs = shortest_path(COSTS.to(dtype), backend="torch")
        assert ours.distance.device == ours.path.device == DEVICE
        assert ours.path.dtype == theirs.path.dtype
        assert torch.equal(ours.path.to(CPU), theirs.path)
        assert error(ours.distance, theirs.distance) <= 1e-6


@pytest.mark.parametrize("backend", ["auto", "torch", "numba"])
def test_shortest_paths_in_graphs(backend: str) -> None:
    if backend == "numba":
        pytest.importorskip("numba")
    edges = torch.tensor([[0, 0, 1, 2, 1, 3], [1, 2, 2, 3, 3, 4]])
    costs = torch.rand(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = shortest_path_graph(costs, edges, source=0, target=4, num_nodes=5, backend="torch")
    for where in (DEVICE, CPU):  # the edges may stay on the CPU
        ours = shortest_path_graph(there(costs), edges.to(where), source=0, target=4, num_nodes=5, backend=backend)
        assert ours.path.device == DEVICE
        assert torch.equal(ours.path.to(CPU), theirs.path)
        assert error(ours.distance, theirs.distance) <= 1e-12
