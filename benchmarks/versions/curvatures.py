"""Curvatures called by themselves, ``step(gradient, hvp, damping)``, and dampings, with their state_dicts."""

from __future__ import annotations

import itertools

import torch
from benchmarks.versions.case import Case, Record
from benchmarks.versions.settings import DAMPINGS, RULES, arguments
from torch import Tensor

import newton_plugin as npl

__all__ = ["cases"]

_SIZES = ((7, 3), (3, 7), (4, 140))  # N, m
_STEPS, _FIRST_HALF = 4, 2


def cases() -> list[Case]:
    """Every rule that is an instance, under three of the dampings."""
    instances = [rule for rule in RULES if rule[0][0].isupper()]
    dampings = [name for name in DAMPINGS if name not in ("auto", "0.1", "this batch")]
    chosen = itertools.product(instances, dampings, _SIZES)
    steps = [_case(rule, damping, n, m) for rule, damping, (n, m) in chosen]
    return [*steps, *(_damping_case(name) for name in dampings)]


def _case(rule_name: tuple[str, str, float], damping: str, n: int, m: int) -> Case:
    curvature, structure, power = rule_name

    def body(record: Record) -> None:
        given = arguments(curvature, structure, power, damping)
        rule, d = given["curvature"], given["damping"]
        for k in range(_STEPS):
            gradient = torch.randn(n, m, dtype=torch.float64)
            roots = torch.randn(n, m, 3, dtype=torch.float64)
            signs = torch.tensor([1.0, 1.0, -0.5], dtype=torch.float64)

            def product(v: Tensor, roots: Tensor = roots, signs: Tensor = signs) -> Tensor:
                return torch.einsum("nir,r,njr,knj->kni", roots, signs, roots, v)

            if k == _FIRST_HALF:
                with record.attempt("state"):
                    state = record.hand_over(rule.state_dict())
                    rule = arguments(curvature, structure, power, damping)["curvature"]
                    rule.load_state_dict(state)
            with record.attempt(f"step {k}"):
                taken = rule.step(gradient, product if rule.needs_hessian else None, d)
                low, high = taken.extremes()
                parts = {"step": taken.step, "damping": taken.damping, "matrix": taken.matrix, "finite": _finite(taken)}
                record.put(f"step {k}", {**parts, "eigenvalues": torch.stack([low, high])})

    return Case(
        "curvatures", f"{curvature}, structure {structure}, power {power:g}, damping {damping}, {n} x {m}", body
    )


def _finite(taken: npl.CurvatureStep) -> Tensor | None:
    """Whether C is finite: an attribute of the step in early states of 0.1.0, later one of its ``finiteness``."""
    return taken.finiteness.curvature if hasattr(taken, "finiteness") else taken.finite  # type: ignore[attr-defined]


def _damping_case(name: str) -> Case:
    def body(record: Record) -> None:
        rule = DAMPINGS[name]()
        record.put("repr", repr(rule))
        record.put("averaging", {k: getattr(rule.averaging, k) for k in ("decay", "growth", "own")})
        values = [1.0, 0.0, 3.0, float("nan"), 1e-9, 1e300, 2.0]
        for k, scale in enumerate(values):
            if k == len(values) // 2 and isinstance(rule, npl.AutoDamping):
                state = record.hand_over(rule.state_dict())
                rule = DAMPINGS[name]()
                rule.load_state_dict(state)
            with record.attempt(f"value {k}"):
                record.put(f"value {k}", rule.value(torch.tensor(scale, dtype=torch.float64)))

    return Case("curvatures", f"damping {name} alone", body)
