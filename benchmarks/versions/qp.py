"""Quadratic and convex programs: solutions, multipliers, gradients, Hessians, failures."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.versions.case import Case, Record
from benchmarks.versions.derivatives import weighed
from torch import Tensor

from newton_plugin.convex import BPQPLayer, ConvexLayer, solve_qp

__all__ = ["cases"]

Data = dict[str, Tensor]

_SIZES = ((2, 0, 0), (4, 0, 3), (5, 2, 0), (6, 2, 5), (8, 3, 12), (12, 2, 40))  # n, m, k
_SOLVERS = ("torch", "auto", "numba", "daqp")


def cases() -> list[Case]:
    """Dense problems by size, batch and solver; special ones; sparse ones; layers."""
    found = []
    for (n, m, k), batch, solver in itertools.product(_SIZES, ("one", "batch", "shared"), _SOLVERS):
        found.append(_dense(n, m, k, batch, solver, "float64"))
    for batch, solver in itertools.product(("one", "batch", "shared"), ("auto", "torch")):
        found.append(_dense(6, 2, 5, batch, solver, "float32"))
    found += [
        _special(kind, solver, mode) for kind in _SPECIAL for solver in _SOLVERS for mode in ("raise", "nan", "warn")
    ]
    found += [_sparse(n, layout, solver) for n in (5, 30) for layout in ("coo", "csr") for solver in ("auto", "torch")]
    found += [_options(name) for name in _OPTIONS]
    found += [_layer(name, batch) for name in _LAYERS for batch in (False, True)]
    return found


def _data(n: int, m: int, k: int, batch: str, dtype: torch.dtype = torch.float64) -> Data:
    """A feasible problem: h leaves slack at a random point."""
    lead = () if batch == "one" else (3,)
    matrices = lead if batch == "batch" else ()
    draw: dict[str, Any] = {"dtype": torch.float64}
    root = torch.randn(*matrices, n, n, **draw)
    data = {"Q": root @ root.mT / n + 0.1 * torch.eye(n, **draw), "p": torch.randn(*lead, n, **draw)}
    x = torch.randn(*lead, n, 1, **draw)
    if m:
        data["A"] = torch.randn(*matrices, m, n, **draw)
        data["b"] = (data["A"] @ x).squeeze(-1)
    if k:
        data["G"] = torch.randn(*matrices, k, n, **draw)
        data["h"] = (data["G"] @ x).squeeze(-1) + torch.rand(*lead, k, **draw)
    return {name: value.to(dtype) for name, value in data.items()}


def _solve(record: Record, name: str, data: Data, hessian: bool = False, **options: Any) -> None:
    """A solution, and the gradients of a sum over it that weighs every entry differently."""
    leaves: dict[str, Any] = {k: v.clone().requires_grad_() for k, v in data.items()}
    with record.attempt(name):
        found = solve_qp(**leaves, **options)
        parts = {"x": found.x, "nu": found.nu, "lam": found.lam, "status": found.status, "active": found.active}
        record.put(name, {**parts, "solver": found.solver, "repr": repr(found)})
        total = weighed(t.nan_to_num() for t in parts.values() if t.is_floating_point())
        gradients = torch.autograd.grad(total, list(leaves.values()), create_graph=hessian, allow_unused=True)
        record.put(f"{name}, gradients", dict(zip(leaves, gradients, strict=True)))
        if hessian:
            squares = torch.stack([g.square().sum() for g in gradients if g is not None]).sum()
            second = torch.autograd.grad(squares, list(leaves.values()), allow_unused=True)
            record.put(f"{name}, second", dict(zip(leaves, second, strict=True)))
            for wrt in leaves:
                record.put(f"{name}, jacobian {wrt}", found.jacobian(wrt))
            record.put(f"{name}, hessian", found.hessian(torch.eye(found.x.shape[-1]).to(found.x)))


def _dense(n: int, m: int, k: int, batch: str, solver: str, dtype: str) -> Case:
    def body(record: Record) -> None:
        data = _data(n, m, k, batch, getattr(torch, dtype))
        _solve(record, "solution", data, hessian=n <= 8 and dtype == "float64", solver=solver)

    return Case("qp", f"dense n={n} m={m} k={k}, {batch}, {solver}, {dtype}", body)


def _changed(change: Callable[[Data], Any]) -> Callable[[], Data]:
    def made() -> Data:
        data = _data(4, 1, 3, "batch")
        change(data)
        return data

    return made


def _linear(data: Data) -> None:
    data["Q"] *= 0
    data["G"] = torch.cat([torch.eye(4), -torch.eye(4)]).double().expand(3, 8, 4).clone()
    data["h"] = torch.full((3, 8), 5.0).double()


def _duplicated(data: Data) -> None:
    data["G"] = torch.cat([data["G"], data["G"]], 1)
    data["h"] = torch.cat([data["h"], data["h"]], 1)


def _infeasible(data: Data) -> None:
    data["G"][1, 1], data["h"][1, 1] = -data["G"][1, 0], -data["h"][1, 0] - 1


def _kink(data: Data) -> None:
    """A row that holds with equality and has no multiplier."""
    data["Q"], data["p"] = torch.eye(4).double().expand(3, 4, 4).clone(), torch.zeros(3, 4).double()
    data["b"] *= 0
    data["h"] *= 0


def _inconsistent(data: Data) -> None:
    data["A"] = torch.cat([data["A"], data["A"]], 1)
    data["b"] = torch.cat([data["b"], data["b"] + 1], 1)


def _fill(name: str, at: Any, value: float) -> Callable[[Data], None]:
    def change(data: Data) -> None:
        data[name][at] = value

    return change


_SPECIAL: dict[str, Callable[[], Data]] = {
    "linear": _changed(_linear),
    "duplicated rows": _changed(_duplicated),
    "infeasible": _changed(_infeasible),
    "inconsistent": _changed(_inconsistent),
    "kink": _changed(_kink),
    "unbounded": _changed(lambda data: data["Q"].mul_(0)),
    "not convex": _changed(_fill("Q", (1, 0, 0), -50.0)),
    "nan": _changed(_fill("p", (1, 2), float("nan"))),
    "no bound": _changed(_fill("h", (1, 2), float("inf"))),
    "zero row": _changed(_fill("G", (1, 2), 0.0)),
    "badly scaled": _changed(lambda data: data["Q"].mul_(torch.tensor([1e-4, 1.0, 1e4]).double()[:, None, None])),
}


def _special(kind: str, solver: str, mode: str) -> Case:
    def body(record: Record) -> None:
        _solve(record, "solution", _SPECIAL[kind](), solver=solver, on_failure=mode)

    return Case("qp", f"{kind}, {solver}, on_failure={mode}", body)


def _sparse(n: int, layout: str, solver: str) -> Case:
    def body(record: Record) -> None:
        data = _data(n, 1, n // 2, "one")
        data["Q"] = torch.diag(data["Q"].diagonal())
        data["G"] = data["G"] * (torch.rand_like(data["G"]) < 0.3)
        data["h"] = data["h"].abs() + 1
        data["b"] = data["b"] * 0
        leaves = {k: v.clone().requires_grad_() for k, v in data.items()}
        form = "to_sparse" if layout == "coo" else "to_sparse_csr"
        given: dict[str, Any] = {k: getattr(v, form)() if k in ("Q", "G") else v for k, v in leaves.items()}
        with record.attempt("solution"):
            found = solve_qp(**given, solver=solver)
            record.put("solution", {"x": found.x, "nu": found.nu, "lam": found.lam, "status": found.status})
            gradients = torch.autograd.grad(found.x.square().sum(), list(leaves.values()), allow_unused=True)
            record.put("gradients", dict(zip(leaves, gradients, strict=True)))

    return Case("qp", f"sparse n={n}, {layout}, {solver}", body)


class _AtZero:
    """A user's solver that finds nothing."""

    def __repr__(self) -> str:
        return "AtZero()"

    def __call__(self, Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros_like(p), torch.zeros_like(b), torch.zeros_like(h)


_OPTIONS: dict[str, dict[str, Any]] = {
    "reg": {"reg": 0.5},
    "refine": {"refine": True},
    "no refinement": {"refine": False},
    "user's solver": {"solver": _AtZero()},
    "unknown solver": {"solver": "cplex"},
    "negative reg": {"reg": -1.0},
    "unknown mode": {"on_failure": "ignore"},
    "wrong shape": {"h": torch.zeros(7).double()},
    "h alone": {"G": None},
}


def _options(name: str) -> Case:
    def body(record: Record) -> None:
        given = dict(_OPTIONS[name])
        data = _data(6, 2, 5, "batch")
        replaced = {k: given.pop(k) for k in data if k in given}
        data = {k: v for k, v in (data | replaced).items() if v is not None}
        _solve(record, "solution", data, **given)
        with record.attempt("layer"):
            layer = BPQPLayer(**given)
            record.put("layer", {"repr": repr(layer), "x": layer(**data)})

    return Case("qp", f"options: {name}", body)


def _cone(x: Tensor, theta: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x).unsqueeze(0) - 1


_LAYERS: dict[str, dict[str, Any]] = {
    "cone": {"objective": lambda x, t: (x - t).square().sum(), "inequality": _cone},
    "entropy": {
        "objective": lambda x, t: (x * x.log() - t * x).sum(),
        "equality": lambda x, t: x.sum().unsqueeze(0) - 1,
        "inequality": lambda x, t: -x,
        "start": torch.full((3,), 1 / 3).double(),
    },
    "quadratic": {
        "objective": lambda x, t: 0.5 * x.square().sum() + t @ x,
        "equality": lambda x, t: x[:1] + x[1:2] - t[:1],
        "inequality": lambda x, t: x - 0.5,
    },
    "linear program": {"objective": lambda x, t: t @ x, "inequality": lambda x, t: torch.cat([x - 1, -x - 1])},
    "unbounded": {"objective": lambda x, t: t @ x},
    "infeasible": {
        "objective": lambda x, t: (x - t).square().sum(),
        "inequality": lambda x, t: torch.cat([x + 1, 2 - x]),
    },
    "unbounded, nan": {"objective": lambda x, t: t @ x, "on_failure": "nan"},
    "concave": {"objective": lambda x, t: -(x - t).square().sum(), "on_failure": "warn"},
}


def _layer(name: str, batch: bool) -> Case:
    def body(record: Record) -> None:
        layer = ConvexLayer(variables=3, **_LAYERS[name])
        record.put("repr", repr(layer))
        theta = torch.randn(*((4,) if batch else ()), 3, dtype=torch.float64, requires_grad=True)
        with record.attempt("solution"):
            found = layer.solve(theta, 0 if batch else None)
            record.put("solution", found._asdict())
            loss = found.x.nan_to_num().square().sum() + found.lam.nan_to_num().sum()
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
            record.put("gradient", gradient)
            record.put("second", torch.autograd.grad(gradient.square().sum(), theta)[0])

    return Case("qp", f"ConvexLayer {name}, {'batch' if batch else 'one'}", body)
