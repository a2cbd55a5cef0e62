"""Bilevel methods: trajectories, checkpoints at their half, and hypergradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from benchmarks.versions.case import Case, Record
from torch import Tensor

from newton_plugin.bilevel import BOREP, MASOBA, AccBO, StocBiO, hypergradient

__all__ = ["cases"]

Closure = Callable[[], Tensor]

_STEPS, _FIRST_HALF = 10, 5
_METHODS: dict[str, Any] = {"AccBO": AccBO, "MASOBA": MASOBA, "BOREP": BOREP, "StocBiO": StocBiO}
_SOLVERS = ("linear", "neumann", "cg")


class _Levels:
    """A weighted ridge regression below, its error on other rows above; or a quadratic with noise."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(dtype)

        self.kind = kind
        self.inside, self.outside = (draw(9, 4), draw(9)), (draw(7, 4), draw(7))
        self.x = (0.1 * draw(9)).requires_grad_()
        self.y = draw(4).requires_grad_()
        self.noise = draw(_STEPS, 4)
        self.at = 0

    def upper(self) -> Tensor:
        z, u = self.outside
        if self.kind == "detached":
            return (z @ self.y.detach() - u).square().mean()
        return (z @ self.y - u).square().mean()

    def lower(self) -> Tensor:
        z, u = self.inside
        weights = torch.sigmoid(self.x)
        loss = (weights * (z @ self.y - u).square()).mean() + 0.05 * self.y.square().sum()
        if self.kind == "noisy":
            return loss + 0.1 * self.noise[self.at] @ self.y
        return -loss if self.kind == "concave" else loss


def cases() -> list[Case]:
    """Methods by solver, way of products, kind of problem and dtype; hypergradients."""
    found = []
    for method, kind, hvp in itertools.product(
        _METHODS, ("ridge", "noisy", "concave", "detached"), ("autograd", "finite_difference")
    ):
        solvers = (None,) if method == "MASOBA" else _SOLVERS
        found += [_trajectory(method, kind, "float64", hvp=hvp, **({"solver": s} if s else {})) for s in solvers]
    found += [_trajectory(method, "noisy", "float32") for method in _METHODS]
    found.append(_trajectory("AccBO", "noisy", "float64", estimator="ema"))
    found += [_trajectory(m, "noisy", "float64", lower_steps=3, lower_every=2) for m in ("AccBO", "BOREP", "StocBiO")]
    found += [_trajectory(m, "ridge", "float64", scale=0.3, terms=4) for m in _METHODS]
    found.append(_trajectory("AccBO", "ridge", "float64", beta=2.0))
    for solver, hvp, kind in itertools.product(
        _SOLVERS, ("autograd", "finite_difference"), ("ridge", "concave", "detached")
    ):
        found += [_hypergradient(kind, solver=solver, hvp=hvp, **more) for more in ({}, {"terms": 3}, {"tol": 1e-3})]
    return found


def _trajectory(method: str, kind: str, dtype: str, **options: Any) -> Case:
    def body(record: Record) -> None:
        levels = _Levels(kind, getattr(torch, dtype))

        def make() -> Any:
            return _METHODS[method]([levels.x], [levels.y], lr_upper=0.1, lr_lower=0.2, **options)

        optimizer = make()
        record.put("repr", repr(optimizer))
        with record.attempt("warm start"):
            record.put("warm start", optimizer.warm_start(levels.lower, 3))
        for levels.at in range(_STEPS):
            if levels.at == _FIRST_HALF:
                with record.attempt("state"):
                    state = record.hand_over(
                        {"optimizer": optimizer.state_dict(), "x": levels.x.detach(), "y": levels.y.detach()}
                    )
                    with torch.no_grad():
                        levels.x.copy_(state["x"])
                        levels.y.copy_(state["y"])
                    optimizer = make()
                    optimizer.load_state_dict(state["optimizer"])
            with record.attempt(f"step {levels.at}"):
                value = optimizer.step(levels.upper, levels.lower)
                record.put(f"step {levels.at}", {"value": value, "x": levels.x, "y": levels.y})
        record.put("calls", repr(optimizer.calls))

    return Case("bilevel", f"{method}, {kind}, {dtype}, {options}", body)


def _hypergradient(kind: str, **options: Any) -> Case:
    def body(record: Record) -> None:
        levels = _Levels(kind, torch.float64)
        with record.attempt("hypergradient"):
            record.put("hypergradient", hypergradient(levels.upper, levels.lower, [levels.x], [levels.y], **options))

    return Case("bilevel", f"hypergradient, {kind}, {options}", body)
