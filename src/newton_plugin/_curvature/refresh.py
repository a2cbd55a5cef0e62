"""A curvature that is computed every k-th step and used in all of them.

C moves as slowly as the network does; gradients are new at every step. Keeping C and its factorisation for k steps
divides the cost of both by k. Steps are counted and nothing else decides, so that all ranks of a distributed run
refresh together.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentError, ArgumentTypeError
from newton_plugin._linalg.damped_inverse import Inverse
from newton_plugin._linalg.diagonal_low_rank import DiagonalLowRank
from newton_plugin._linalg.matrices import Dense, Diagonal, Form, Isotropic
from newton_plugin._linalg.sketch import Sketch
from newton_plugin._runtime.cuda_graphs import refuse_in_a_capture

__all__ = ["Kept", "check_refresh_every"]

_FORMS: dict[str, type] = {form.__name__: form for form in (Isotropic, Diagonal, Dense, DiagonalLowRank, Sketch)}


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


class Kept:
    """C in its form, the damping and the inverse, for ``every`` steps.

    Args:
        every: steps from one refresh to the next; 1 keeps nothing.
        power: of the inverse.
    """

    def __init__(self, every: int, power: float) -> None:
        self.every = every
        self.power = power
        self.form: Form | None = None
        self.damping: Tensor | None = None
        self.finite: Tensor | None = None
        self._shape: tuple[int, int] | None = None
        self._age = 0
        self._inverse: Inverse | None = None

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_inverse": None}  # a closure; made again from form and damping
        if self.every == 1:
            state |= {"form": None, "damping": None, "finite": None}
        return state

    @property
    def due(self) -> bool:
        """Whether C is to be computed at this step."""
        return self.form is None or self._age >= self.every

    def fits(self, features: int, groups: int) -> bool:
        """Whether the kept C is of outputs of this shape."""
        return self._shape == (features, groups)

    def put(self, form: Form, damping: Tensor, finite: Tensor | None, features: int, groups: int) -> None:
        """Keep C; its inverse is made when it is first asked for."""
        self.form, self.damping, self.finite = form, damping, finite
        self._shape, self._age, self._inverse = (features, groups), 0, None

    def use(self, device: torch.device) -> tuple[Inverse, Form, Tensor]:
        """Count one step; the inverse of the C that is kept, C, and the damping."""
        form, damping = self.use_form(device)
        if self._inverse is None:
            self._inverse = form.inverse(damping, self.power)
        return self._inverse, form, damping

    def use_form(self, device: torch.device) -> tuple[Form, Tensor]:
        """:meth:`use` without the inverse."""
        form, damping = self._current(device)
        refuse_in_a_capture(damping, self.every)
        self._age += 1
        return form, damping

    def _current(self, device: torch.device) -> tuple[Form, Tensor]:
        """C and the damping, which follow the gradients to their device: a checkpoint may come from another one."""
        if self.form is None or self.damping is None:
            raise AssertionError("no C is kept: see due")
        if self.damping.device != device:
            values = {f.name: getattr(self.form, f.name) for f in fields(self.form)}  # type: ignore[arg-type]
            moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in values.items()}
            self.form, self.damping, self._inverse = type(self.form)(**moved), self.damping.to(device), None
            self.finite = None if self.finite is None else self.finite.to(device)
        return self.form, self.damping

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors; empty if nothing is kept for the next step."""
        if self.form is None or self.every == 1:
            return {}
        tensors = {f.name: getattr(self.form, f.name) for f in fields(self.form)}  # type: ignore[arg-type]
        return {
            "form": type(self.form).__name__,
            "fields": tensors,
            "damping": self.damping,
            "finite": self.finite,
            "shape": list(self._shape or ()),
            "age": self._age,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.form = _FORMS[state["form"]](**state["fields"]) if state else None
        self.damping, self.finite = state.get("damping"), state.get("finite")
        self._shape = tuple(state["shape"]) if state.get("shape") else None  # type: ignore[assignment]
        self._age, self._inverse = state.get("age", 0), None
