"""Shortest paths, and the smoothing of functions that have no useful derivative; noise from seeded generators."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from benchmarks.versions.case import Case, Record
from benchmarks.versions.derivatives import put_derivatives
from torch import Tensor

import newton_plugin as npl
from newton_plugin import algorithms as alg

__all__ = ["cases"]

_BACKENDS = ("torch", "auto", "numba")
_NOISES = ("gaussian", "gumbel", "cauchy")
_BASELINES = ("leave_one_out", "value", "none")
_ESTIMATORS = ("score", "symmetric_score", "finite_difference")
_MAPS = ("random", "ties", "one row", "one vertex", "negative", "nan", "integers", "float32", "none")


def cases() -> list[Case]:
    """Paths on grids and graphs, relaxed paths, smoothed functions and solvers, Fenchel-Young losses."""
    found = [_grid(kind, backend) for kind in _MAPS for backend in _BACKENDS]
    found += [
        _graph(kind, backend) for kind in ("random", "ties", "unreachable", "same", "bad edge") for backend in _BACKENDS
    ]
    for loop, stop, checkpoint, steepness in itertools.product(
        ("for", "while"), (False, True), (False, True), (1.0, 20.0)
    ):
        found.append(_relaxed(loop=loop, stop_at_start=stop, checkpoint=checkpoint, steepness=steepness))
    found += [_relaxed(iterations=3), _relaxed(iterations=9, loop="while", max_steps=4), _relaxed(loop="until")]
    options = list(itertools.product(_NOISES, _BASELINES, (False, True)))
    for (noise, baseline, antithetic), estimator in itertools.product(options, _ESTIMATORS):
        more = {"noise": noise, "baseline": baseline, "antithetic": antithetic, "estimator": estimator}
        found += [_black_box(kind, **more) for kind in ("loss", "solutions", "optimizer", "minimizer")]
    for (noise, baseline, antithetic), minimize in itertools.product(options, (False, True)):
        for reduction in ("mean", "sum", "none"):
            more = {"noise": noise, "baseline": baseline, "antithetic": antithetic}
            found.append(_fenchel_young(minimize=minimize, reduction=reduction, **more))
    return found


def _map(kind: str) -> Tensor:
    shape = {"one row": (2, 1, 6), "one vertex": (2, 1, 1), "none": (0, 4, 4)}.get(kind, (3, 5, 6))
    costs = torch.rand(shape, dtype=torch.float64)
    if kind == "ties":
        return (3 * costs).round()
    if kind in ("negative", "nan"):
        costs[1, 2, 2] = -1.0 if kind == "negative" else float("nan")
    return costs.float() if kind == "float32" else (9 * costs).long() if kind == "integers" else costs


def _grid(kind: str, backend: str) -> Case:
    def body(record: Record) -> None:
        costs = _map(kind)
        costs.requires_grad_(costs.is_floating_point())
        with record.attempt("path"):
            found = alg.shortest_path(costs, backend=backend)
            record.put("path", found._asdict())
            record.put("gradient", torch.autograd.grad(found.distance.square().sum(), costs))

    return Case("paths", f"shortest_path, {kind}, {backend}", body)


def _graph(kind: str, backend: str) -> Case:
    def body(record: Record) -> None:
        nodes = 7
        edges = torch.randint(0, nodes, (2, 30))
        ring = torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes])
        edges = torch.cat([ring, edges], 1)
        if kind == "unreachable":
            edges = edges[:, (edges[1] != 5) | (edges[0] == 5)]
        if kind == "bad edge":
            edges[1, 3] = nodes
        costs = torch.rand(4, edges.shape[1], dtype=torch.float64)
        costs = (3 * costs).round() if kind == "ties" else costs
        costs.requires_grad_()
        with record.attempt("path"):
            target = 0 if kind == "same" else 5
            found = alg.shortest_path_graph(costs, edges, 0, target, nodes, backend=backend)
            record.put("path", found._asdict())
            record.put("gradient", torch.autograd.grad(found.distance.square().sum(), costs))

    return Case("paths", f"shortest_path_graph, {kind}, {backend}", body)


def _relaxed(**options: Any) -> Case:
    def body(record: Record) -> None:
        costs = torch.rand(2, 4, 5, dtype=torch.float64)
        put_derivatives(record, "path", lambda c: alg.relaxed_bellman_ford(c, **options), costs)

    return Case("paths", f"relaxed_bellman_ford, {options}", body)


def _highest(scores: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1])


def _lowest(scores: Tensor) -> Tensor:
    return _highest(-scores)


def _steps_of(y: Tensor) -> Tensor:
    return (y > 0.3).to(y).sum(-1) + y.abs().amax(-1)


def _black_box(kind: str, **options: Any) -> Case:
    def body(record: Record) -> None:
        given = {**options, "samples": 6, "sigma": 0.4, "generator": torch.Generator().manual_seed(3)}
        if kind == "loss":
            box: Any = alg.StochasticSmoothing(_steps_of, **given)
        elif kind == "solutions":
            box = alg.StochasticSmoothing(_highest, **given)
        else:
            solver = _highest if kind == "optimizer" else _lowest
            box = alg.PerturbedOptimizer(solver, minimize=kind == "minimizer", **given)
        record.put("repr", repr(box))
        put_derivatives(record, "value", box, torch.randn(3, 4, dtype=torch.float64))

    return Case("paths", f"smoothed {kind}, {options}", body)


def _fenchel_young(**options: Any) -> Case:
    def body(record: Record) -> None:
        solver = _lowest if options["minimize"] else _highest
        generator = torch.Generator().manual_seed(4)
        loss = alg.FenchelYoungLoss(solver, samples=6, sigma=0.4, generator=generator, **options)
        record.put("repr", repr(loss))
        y, target = torch.randn(3, 4, dtype=torch.float64), _highest(torch.randn(3, 4)).double()
        put_derivatives(record, "loss", lambda s: loss(s, target), y)
        if options["reduction"] != "none":
            with record.attempt("step"):
                rule = {"curvature": "hessian", "damping": 0.1, "reduction": options["reduction"]}
                record.put("step", npl.newton_step(loss, y, target, **rule)._asdict())

    return Case("paths", f"FenchelYoungLoss, {options}", body)
