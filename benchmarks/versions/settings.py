"""The arguments of a step: curvature, structure, power and damping, by name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

import newton_plugin as npl

__all__ = ["CURVATURES", "DAMPINGS", "DTYPES", "REDUCTIONS", "RULES", "arguments"]

STRUCTURES = ("auto", "mean", "per_sample", "isotropic", "diagonal", "block")
POWERS = (1, 0.5)
REDUCTIONS: tuple[Literal["mean", "sum"], ...] = ("mean", "sum")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class UserCurvature(npl.Curvature):
    """A user's own: the diagonal of the Fisher, with a running sum for its state."""

    needs_hessian = False

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def __repr__(self) -> str:
        return "UserCurvature()"

    def step(self, gradient: Tensor, hvp: Any, damping: Any, ranks: Any = None, **more: Any) -> Any:
        """``g / (sum of the diagonals so far + d)``."""
        diagonal = gradient.square().mean(0)
        self.total = total = diagonal if self.total is None else self.total + diagonal
        d = damping.value(torch.linalg.vector_norm(total) / total.numel() ** 0.5)
        return npl.CurvatureStep(gradient / (total + d), d, total, lambda: (total.min(), total.max()))

    def state_dict(self) -> dict[str, Any]:
        return {} if self.total is None else {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state.get("total")


class UserDamping(npl.Damping):
    """A user's own: the root of the scale, with an average of C."""

    averaging = npl.Averaging(decay=0.5, growth=3.0)

    def __repr__(self) -> str:
        return "UserDamping()"

    def value(self, scale: Tensor) -> Tensor:
        return 0.1 * scale.sqrt() + 1e-3


def _by_name(name: str) -> Callable[[str, float], dict[str, Any]]:
    return lambda structure, power: {"curvature": name, "structure": structure, "power": power}


def _instance(make: Callable[..., Any], **more: Any) -> Callable[[str, float], dict[str, Any]]:
    def given(structure: str, power: float) -> dict[str, Any]:
        return {"curvature": make("mean" if structure == "auto" else structure, power, **more)}

    return given


_WHOLE = ("SoftNormalization", "UserCurvature")  # have no structure and no power to be chosen
CURVATURES: dict[str, Callable[[str, float], dict[str, Any]]] = {
    "fisher": _by_name("fisher"),
    "hessian": _by_name("hessian"),
    "norm": _by_name("norm"),
    "auto": _by_name("auto"),
    "EmpiricalFisher": _instance(npl.EmpiricalFisher),
    "EmpiricalFisher refreshed": _instance(npl.EmpiricalFisher, refresh_every=3),
    "Hessian": _instance(npl.Hessian),
    "Hessian refreshed": _instance(npl.Hessian, refresh_every=3),
    "Hessian 40 products": _instance(npl.Hessian, tolerance=1e-10, products=40),
    "SoftNormalization": lambda s, p: {"curvature": npl.SoftNormalization(0.3), "structure": s, "power": p},
    "UserCurvature": lambda s, p: {"curvature": UserCurvature(), "structure": s, "power": p},
}
DAMPINGS: dict[str, Callable[[], Any]] = {
    "auto": lambda: "auto",
    "0.1": lambda: 0.1,
    "Tikhonov": lambda: npl.Tikhonov(2.0),
    "own 0": lambda: npl.AutoDamping(own=0.0),
    "this batch": lambda: npl.AutoDamping(ratio=1.0, decay=0.0),
    "all parts": lambda: npl.AutoDamping(ratio=0.05, decay=0.5, growth=1.5, floor=0.5, own=0.2),
    "UserDamping": UserDamping,
}
# Every rule that the package takes, and some that it refuses.
RULES = [
    *itertools.product([c for c in CURVATURES if c not in _WHOLE], STRUCTURES, POWERS),
    *((curvature, structure, power) for curvature in _WHOLE for structure, power in (("auto", 1), ("diagonal", 0.5))),
]


def arguments(curvature: str, structure: str, power: float, damping: str) -> dict[str, Any]:
    """Keyword arguments of a door, with instances of their own.

    Raises:
        newton_plugin.NewtonPluginError: a combination that the package refuses.
    """
    return {**CURVATURES[curvature](structure, power), "damping": DAMPINGS[damping]()}
