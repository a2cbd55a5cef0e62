"""A curvature that is computed every k-th step and used in all of them: ``refresh_every``.

C changes as slowly as the network does, while gradients are new at every step. One C and one factorisation for k steps
divide the cost of both by k. The number of steps and the shape of the outputs decide when C is computed anew. Both are
the same on all ranks of a distributed run.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError
from newton_plugin._linalg.damped_inverse import Inverse
from newton_plugin._linalg.diagonal_low_rank import DiagonalLowRank
from newton_plugin._linalg.matrices import Dense, Diagonal, Isotropic, SymmetricMatrix
from newton_plugin._linalg.sketch import Sketch
from newton_plugin._runtime.cuda_graphs import refuse_in_a_capture

__all__ = ["KeptCurvature", "check_refresh_every"]

_MATRICES: dict[str, type] = {kind.__name__: kind for kind in (Isotropic, Diagonal, Dense, DiagonalLowRank, Sketch)}


def check_refresh_every(refresh_every: Any, structure: str) -> int:
    """A positive integer; 1 where every sample has a C of its own, which is new with the sample."""
    if isinstance(refresh_every, bool) or not isinstance(refresh_every, int):
        raise ArgumentTypeError(
            f"refresh_every must be a positive integer; got {refresh_every!r} of type {type(refresh_every).__name__}."
        )
    if refresh_every < 1:
        raise ArgumentError(f"refresh_every must be a positive integer; got {refresh_every}. 1 keeps nothing.")
    if refresh_every > 1 and structure == "per_sample":
        raise ArgumentError(
            f"refresh_every must be 1 with structure='per_sample'; got {refresh_every}. Each sample has a C of its "
            "own, and the next batch brings other samples. Use structure='mean', 'block', 'diagonal' or 'isotropic'."
        )
    return refresh_every


class KeptCurvature:
    """C, its damping and its damped inverse, for ``every`` steps.

    Args:
        every: steps from one refresh to the next; with 1 every step computes C.
        power: of the inverse.
    """

    def __init__(self, every: int, power: float) -> None:
        self.every = every
        self.power = power
        self.matrix: SymmetricMatrix | None = None
        self.damping: Tensor | None = None
        self.finite: Tensor | None = None
        self._shape: tuple[int, int] | None = None
        self._age = 0
        self._inverse: Inverse | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_inverse": None}  # a closure; made again from matrix and damping
        if self.every == 1:
            state |= {"matrix": None, "damping": None, "finite": None}
        return state

    @property
    def due(self) -> bool:
        """Whether the next step computes C, whatever the shape of its outputs."""
        return self.matrix is None or self._age >= self.every

    def serves(self, features: int, groups: int) -> bool:
        """Whether the next step, of outputs of this shape, uses the C that is there."""
        return not self.due and self._shape == (features, groups)

    def put(
        self, matrix: SymmetricMatrix, damping: Tensor, finite: Tensor | None, features: int, groups: int = 1
    ) -> None:
        """Keep a new C. Its inverse is computed when it is first asked for."""
        self.matrix, self.damping, self.finite = matrix, damping, finite
        self._shape, self._age, self._inverse = (features, groups), 0, None

    def use(self, device: torch.device) -> tuple[Inverse, SymmetricMatrix, Tensor]:
        """Count one step; return the damped inverse of C, C, and the damping."""
        matrix, damping = self.use_matrix(device)
        if self._inverse is None:
            self._inverse = matrix.inverse(damping, self.power)
        return self._inverse, matrix, damping

    def use_matrix(self, device: torch.device) -> tuple[SymmetricMatrix, Tensor]:
        """:meth:`use` without the inverse."""
        matrix, damping = self._on(device)
        refuse_in_a_capture(damping, self.every)
        self._age += 1
        return matrix, damping

    def _on(self, device: torch.device) -> tuple[SymmetricMatrix, Tensor]:
        """C and the damping on the device of the gradients: a checkpoint may come from another one."""
        if self.matrix is None or self.damping is None:
            raise AssertionError("no C is kept: see due")
        if self.damping.device != device:
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in _values(self.matrix).items()}
            self.matrix, self.damping, self._inverse = type(self.matrix)(**moved), self.damping.to(device), None
            self.finite = None if self.finite is None else self.finite.to(device)
        return self.matrix, self.damping

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors; empty before the first C, and with ``every = 1``."""
        if self.matrix is None or self.every == 1:
            return {}
        return {
            "form": type(self.matrix).__name__,
            "fields": _values(self.matrix),
            "damping": self.damping,
            "finite": self.finite,
            "shape": list(self._shape or ()),
            "age": self._age,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.matrix = _MATRICES[state["form"]](**state["fields"]) if state else None
        self.damping, self.finite = state.get("damping"), state.get("finite")
        self._shape = tuple(state["shape"]) if state.get("shape") else None  # type: ignore[assignment]
        self._age, self._inverse = state.get("age", 0), None


def _values(matrix: SymmetricMatrix) -> dict[str, Any]:
    """The fields of a matrix by name."""
    return {f.name: getattr(matrix, f.name) for f in fields(matrix)}  # type: ignore[arg-type]
