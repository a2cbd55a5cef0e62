"""Sorts and what is built on them: values, gradients, Hessians."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.versions.case import Case, Record
from benchmarks.versions.derivatives import put_derivatives
from torch import Tensor

import newton_plugin as npl
from newton_plugin import algorithms as alg

__all__ = ["cases"]

_LAYOUTS = ("odd_even", "bitonic")
_SWAPS = ("logistic", "cauchy", "gaussian", "reciprocal", "optimal")
_SCORES = ("random", "ties", "far apart", "in order")


class _UserSort:
    """A user's own method: scores to P."""

    def __repr__(self) -> str:
        return "UserSort()"

    def __call__(self, scores: Tensor) -> Tensor:
        places = torch.arange(1, 1 + scores.shape[-1]).unsqueeze(-1)
        return torch.softmax(scores.unsqueeze(-2) * places, -1)


# A method with its arguments.
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "neural_sort": ("neural_sort", {"temperature": 0.5}),
    "soft_sort 1": ("soft_sort", {"temperature": 0.5}),
    "soft_sort 2": (alg.soft_sort, {"temperature": 0.7, "p": 2}),
    **{
        f"network {layout} {swap}": ("sorting_network", {"layout": layout, "swap": swap, "steepness": 3.0})
        for layout, swap in itertools.product(_LAYOUTS, _SWAPS)
    },
    "callable": (_UserSort(), {}),
    "unknown": ("bubble_sort", {}),
    "unknown argument": ("soft_sort", {"steepness": 1.0}),
}


def cases() -> list[Case]:
    """Matrices; the ranking loss; the losses on soft ranks; Newton steps on lists."""
    found = []
    for kind, n in itertools.product(_SCORES, (1, 2, 5, 8)):
        for name, matrix in _matrices().items():
            found.append(_matrix(name, matrix, kind, n))
    for name, reduction, kind in itertools.product(METHODS, ("mean", "sum", "none"), _SCORES):
        found.append(_ranking(name, reduction, kind, "float64"))
    found += [_ranking(name, "mean", "random", dtype) for name in METHODS for dtype in ("float32", "bfloat16")]
    found += [_ranking(name, "mean", kind, "float64", masked=True) for name in METHODS for kind in ("random", "ties")]
    found += [_measure(name, measure, kind) for name in METHODS for measure in _MEASURES for kind in _SCORES[:2]]
    return found


def _scores(kind: str, *shape: int) -> Tensor:
    scores = torch.randn(shape, dtype=torch.float64)
    if kind == "ties":
        return scores.round()
    if kind == "far apart":
        return 200 * scores
    return scores.sort(-1).values if kind == "in order" else scores


def _matrices() -> dict[str, Callable[[Tensor], Any]]:
    made: dict[str, Callable[[Tensor], Any]] = {
        "neural_sort": lambda s: alg.neural_sort(s, 0.5),
        "soft_sort 1": lambda s: alg.soft_sort(s, 0.5),
        "soft_sort 2": lambda s: alg.soft_sort(s, 0.5, 2),
    }
    for layout, swap in itertools.product(_LAYOUTS, _SWAPS):
        made[f"network {layout} {swap}"] = lambda s, layout=layout, swap=swap: alg.SortingNetwork(
            s.shape[-1], layout, swap, 3.0
        )(s)
    return made


def _matrix(name: str, matrix: Callable[[Tensor], Any], kind: str, n: int) -> Case:
    def body(record: Record) -> None:
        put_derivatives(record, "P", matrix, _scores(kind, 3, n))

    return Case("sorts", f"matrix, {name}, {kind}, n={n}", body)


def _ranking(name: str, reduction: str, kind: str, dtype: str, masked: bool = False) -> Case:
    def body(record: Record) -> None:
        method, given = METHODS[name]
        loss = alg.RankingLoss(method, reduction=reduction, **given)
        record.put("repr", type(loss).__name__ if callable(method) else repr(loss))
        scores = _scores(kind, 4, 5).to(getattr(torch, dtype))
        ranks = torch.rand(4, 5).argsort(-1)
        if kind == "ties":
            ranks = ranks // 2
        more = {"mask": torch.rand(4, 5) < 0.7} if masked else {}
        put_derivatives(record, "loss", lambda s: loss(s, ranks, **more), scores)
        if reduction != "none" and not masked:
            for structure in ("mean", "per_sample"):
                with record.attempt(f"step, {structure}"):
                    rule = {"curvature": "hessian", "structure": structure, "damping": 0.1, "reduction": reduction}
                    record.put(f"step, {structure}", npl.newton_step(loss, scores, ranks, **rule)._asdict())

    return Case("sorts", f"RankingLoss, {name}, {reduction}, {kind}, {dtype}{', masked' if masked else ''}", body)


_Measure = Callable[..., Tensor]
_MEASURES: dict[str, _Measure] = {
    "soft_rank": lambda s, r, *m, **a: alg.soft_rank(s, *m, **a),
    "soft_top_k": lambda s, r, *m, **a: alg.soft_top_k(s, 2, *m, **a),
    "soft_top_k smallest": lambda s, r, *m, **a: alg.soft_top_k(s, 3, *m, largest=False, **a),
    "soft_top_k refused": lambda s, r, *m, **a: alg.soft_top_k(s, 9, *m, **a),
    "spearman_loss": lambda s, r, *m, **a: alg.spearman_loss(s, r, *m, **a),
    "ndcg_loss": lambda s, r, *m, **a: alg.ndcg_loss(s, r, *m, **a),
    "ndcg_loss, linear, k": lambda s, r, *m, **a: alg.ndcg_loss(s, r, *m, k=3, gain="linear", **a),
    "average_precision_loss": lambda s, r, *m, **a: alg.average_precision_loss(s, r % 2, *m, **a),
}


def _measure(name: str, measure: str, kind: str) -> Case:
    def body(record: Record) -> None:
        method, given = METHODS[name]
        ranks = torch.rand(4, 6).argsort(-1)
        put_derivatives(record, "value", lambda s: _MEASURES[measure](s, ranks, method, **given), _scores(kind, 4, 6))

    return Case("sorts", f"{measure}, {name}, {kind}", body)
