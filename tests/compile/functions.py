"""A case for each autograd Function of the package: a call of its ``apply`` on tensors that may ask for gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from newton_plugin.algorithms import SortingNetwork
from newton_plugin.algorithms._black_box.black_box import BlackBox, _Draw, _Solve
from newton_plugin.algorithms._black_box.differences import _Differences
from newton_plugin.algorithms._list_loss.function import ListLoss
from newton_plugin.algorithms._shortest_paths.cheapest import Cheapest
from newton_plugin.algorithms._shortest_paths.grid import _Around, _Gathered
from newton_plugin.algorithms._sorting.neural_sort import NeuralSort
from newton_plugin.algorithms._sorting_network.chain import Chain
from newton_plugin.convex import ConvexLayer
from newton_plugin.convex._qp.find_active_set import FindActiveSet
from newton_plugin.convex._smooth.find_point import FindPoint, Request
from newton_plugin.convex._smooth.program import Program
from newton_plugin.convex._sparse.solve import SparseSolve, _Once
from newton_plugin.convex._sparse.system import SparseSystem
from newton_plugin.convex._system.kkt import KKTSolve

__all__ = ["CASES", "Case"]

Case = tuple[Callable[..., Any], tuple[Tensor, ...]]
"""A function and its tensors."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def box_qp(batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """|x_i| <= 0.3 in four variables: Q and C shared, p and c not."""
    eye = torch.eye(4, dtype=torch.float64)
    return eye + 0.1, randn(batch, 4), torch.cat((eye, -eye)), torch.full((batch, 8), 0.3, dtype=torch.float64)


def request(batch: int) -> Any:
    from newton_plugin.convex._qp import find_active_set

    return find_active_set.Request(
        n=4, rows=8, m=0, solver="torch", refine="auto", on_failure="raise", shape=(batch,), precision=2.2e-16
    )


def find_active_set(batch: int) -> Case:
    return lambda *data: FindActiveSet.apply(*data, request(batch)), box_qp(batch)


def kkt(batch: int, known: bool) -> Case:
    Q, p, C, c = box_qp(batch)
    x, y, _, _, *factors = FindActiveSet.apply(Q, p, C, c, request(batch))
    rest = (x.unsqueeze(-1), y.unsqueeze(-1)) if known else (None, None)
    return lambda *data: KKTSolve.apply(*data, *rest, *factors), (Q, C, -p.unsqueeze(-1), c.unsqueeze(-1))


def compiled_qp(batch: int) -> Case:
    from newton_plugin.convex import solve_qp
    from newton_plugin.convex._compiled import qp

    Q, p, C, c = box_qp(batch)
    kept: list[Any] = []
    real = qp.find

    def keep(*args: Any) -> Any:
        kept.append(real(*args))
        return kept[0]

    qp.find = keep
    try:
        solve_qp(Q, p, None, None, C, c, solver="numba")
    finally:
        qp.find = real
    none = torch.zeros(0, 4, dtype=torch.float64), torch.zeros(batch, 0, dtype=torch.float64)
    return lambda Q, p, G, h: qp.CompiledQP.apply(Q, p, *none, G, h, kept[0]), (Q, p, C, c)


def find_point(batch: int, leaves: int) -> Case:
    """The nearest point of a disc; one tensor or two in theta."""
    layer = ConvexLayer(
        lambda x, t: ((x - t[0]) ** 2).sum() + (t[1] * x.sum() if leaves == 2 else 0.0),
        inequality=lambda x, t: torch.linalg.vector_norm(x)[None] - 1,
        variables=3,
    )
    theta = (randn(3, seed=batch), randn(1)[0])[:leaves]
    program = Program(layer.objective, None, layer.inequality, pytree.tree_flatten(theta)[1])
    return lambda *t: FindPoint.apply(Request(layer, program, (None,) * leaves), *t), theta


def sparse_solve(batch: int) -> Case:
    n = 3 + batch
    two, one = torch.full((n,), 2.0, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    index = torch.arange(n).repeat(2, 1)
    system = SparseSystem(index, index, n, n, 0)
    system.find(two, randn(n), one, 0.1 * one, "auto", 2.2e-16)
    return lambda *data: SparseSolve.apply(*data, system), (two, one, randn(n, 1), 0.1 * one.unsqueeze(-1))


def chain(lists: int, n: int) -> Case:
    network = SortingNetwork(n)
    return lambda x: Chain.apply(x, network)[0], (network._prepare(randn(lists, n)),)


def list_loss(lists: int) -> Case:
    ranks = randn(lists, 4, seed=1).argsort(-1)
    target = torch.eye(4, dtype=torch.float64)[ranks]
    method = NeuralSort(temperature=0.5)
    return lambda scores: ListLoss.apply(scores, target, None, method, []), (randn(lists, 4),)


def by_numpy(costs: Tensor) -> tuple[Tensor, Tensor]:
    best = torch.from_numpy(costs.numpy().argmin(-1))
    return costs.amin(-1), torch.nn.functional.one_hot(best, costs.shape[-1]).double()


def box() -> BlackBox:
    """Ranks by numpy, with noise that is the same at each call."""
    generator = torch.Generator().manual_seed(0)
    return BlackBox(lambda z: torch.from_numpy(z.numpy().argsort(-1).argsort(-1)), 8, 0.5, generator=generator)


def differences(problems: int, directions: int) -> Case:
    y, value = randn(problems, 5), randn(problems, 5, seed=1)
    noise = box().draw(y)
    given = (y, value, *(randn(problems, 5, seed=2 + i) for i in range(directions)))
    return lambda y, value, *w: _Differences.apply(y, noise, value, box(), 0.5, *w), given


CASES: dict[str, tuple[type[torch.autograd.Function] | str, Callable[[int], Case]]] = {
    "FindActiveSet": (FindActiveSet, find_active_set),
    "KKTSolve": (KKTSolve, lambda b: kkt(b, known=False)),
    "KKTSolve, known": (KKTSolve, lambda b: kkt(b, known=True)),
    "CompiledQP": ("CompiledQP", compiled_qp),
    "FindPoint": (FindPoint, lambda b: find_point(b, 1)),
    "FindPoint, two leaves": (FindPoint, lambda b: find_point(b, 2)),
    "SparseSolve": (SparseSolve, sparse_solve),
    "_Once": (_Once, lambda b: (_Once.apply, (randn(b),))),
    "Chain": (Chain, lambda b: chain(b, 4)),
    "Chain, long": (Chain, lambda b: chain(b, 40)),
    "ListLoss": (ListLoss, list_loss),
    "_Around": (_Around, lambda b: (lambda x: _Around.apply(x, 3, 5), (randn(2, 3, b),))),
    "_Gathered": (_Gathered, lambda b: (lambda y: _Gathered.apply(y, 2, 3), (randn(3, 3, 3, 5, b),))),
    "Cheapest": (Cheapest, lambda b: (lambda c: Cheapest.apply(c, by_numpy, 1), (randn(b, 5),))),
    "_Draw": (_Draw, lambda b: (lambda y: _Draw.apply(y, box()), (randn(b, 5),))),
    "_Solve": (_Solve, lambda b: (lambda y: _Solve.apply(y, box()), (randn(8, b, 5),))),
    "_Differences": (_Differences, lambda b: differences(b, 0)),
    "_Differences, along one": (_Differences, lambda b: differences(b, 1)),
    "_Differences, along two": (_Differences, lambda b: differences(b, 2)),
}
"""The Function (its name, where a package that it needs may be missing), and its case for a batch size."""
