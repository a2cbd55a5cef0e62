r"""Curvatures: from per-sample gradients (and Hessian-vector products) to the step in output space.

A curvature answers one question: given ``g_i`` and, if it asks for them, products ``H_i v``, what is
``step_i = (C + damping I)^-power g_i``? It gives back the *step*, not the matrix, so that one that never
forms C fits beside those that do. One family:

=====================  ==========================================  ==============================
curvature              C                                           who knows it as
=====================  ==========================================  ==============================
``Hessian``            ``1/N sum_i H_i``                           Newton, at the loss
``EmpiricalFisher``    ``1/N sum_i g_i g_i'``                      natural gradient, at the loss
``SoftNormalization``  ``g_i g_i'`` for each sample, power 1/2     smooth per-sample normalisation
=====================  ==========================================  ==============================

``structure`` says how much of C is kept: "mean", one m x m matrix for the batch (the paper's); "per_sample",
one for each sample; "block", one for each position where feature_dims leave several (outputs (N, T, V) with
feature_dims=-1: T matrices V x V); "diagonal", its diagonal; "isotropic", ``(tr C / m) I``, the control which shows
whether directions matter at all, and the default (docs/when-it-helps.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from newton_plugin._curvature.damping import Damping
from newton_plugin._derivatives.sample_hessians import HVP
from newton_plugin._errors import ShapeError, check_choice
from newton_plugin._runtime.processes import ONE_PROCESS, Ranks

__all__ = [
    "HVP",
    "STRUCTURES",
    "Curvature",
    "CurvatureStep",
    "Structure",
    "check_groups",
    "check_power",
    "describe",
]

Structure = Literal["mean", "per_sample", "isotropic", "diagonal", "block"]
STRUCTURES = ("mean", "per_sample", "isotropic", "diagonal", "block")


@dataclass
class CurvatureStep:
    """What a curvature gives back for one batch.

    Attributes:
        step: (N, m); see ``weight`` in :meth:`Curvature.step`.
        damping: what was added to C; no dimensions.
        matrix: C as it was used: (m, m); by structure (N, m, m) per sample, (T, m, m) for blocks, (m,) if diagonal,
            no dimensions if isotropic; None where it was never formed.
        extremes: smallest and largest eigenvalue of C, computed only when called.
        fallback: why a simpler curvature took this one's place; empty if none did.
        zero_hessian: True where the batch's Hessian was zero throughout and Fisher took its place; a tensor
            without dimensions, to be read when the host waits anyway. None: not looked for.
        finite: whether this batch's C is finite; a tensor without dimensions. Where it is not, the gradient stays as
            it is. None: not looked for.
        agreed: whether ``finite`` is the same on all ranks and covers all their gradients, so that they need not ask
            one another again. A sum of squares over the ranks does: one NaN among the gradients is in it.
        inner: what is at hand and finite only if all gradients and steps are (the gradients need not count where
            ``finite`` and ``agreed`` cover them): ``g_i' step_i`` or multiples, one number a sample; the steps; or one
            number without dimensions, not negative. None: worked out from the rows.
        bounded: known of this curvature and damping: where C is finite, all gradients and steps are.
        sizes: ``sum |g_i|^2`` and ``sum |step_i|^2`` for people, computed only when called; None: from the rows.
        fine: whether the step is to be taken, and not the gradient; the rule that asked sets it.
    """

    step: Tensor
    damping: Tensor
    matrix: Tensor | None
    extremes: Callable[[], tuple[Tensor, Tensor]]
    fallback: str = ""
    zero_hessian: Tensor | None = None
    finite: Tensor | None = None
    agreed: bool = False
    inner: Tensor | None = None
    bounded: bool = False
    sizes: Callable[[], tuple[Tensor, Tensor]] | None = None
    fine: Tensor | None = None


@runtime_checkable
class Curvature(Protocol):
    """A rule from derivatives to the step in output space. Instances may keep a running state."""

    needs_hessian: bool

    def step(self, gradient: Tensor, hvp: HVP | None, damping: Damping, ranks: Ranks = ONE_PROCESS) -> CurvatureStep:
        """The step of every sample.

        Args:
            gradient: (N, m), the per-sample gradients ``g_i``, float64 where the device has it.
            hvp: Hessian-vector products; None if ``needs_hessian`` is False.
            damping: the rule for the damping.
            ranks: the processes that share the batch. ``ranks.mean(total, N)`` adds what they have and divides by
                all their samples; a curvature that takes no ``ranks`` works in one process or with sync=False.

        A curvature with an attribute ``structure`` equal to "block" gets one argument more, ``groups``: T, where the
        rows are those of T positions in each sample, (N T, m), sample by sample. One with a method
        ``wants_hessian(features) -> bool`` is asked before the loss is differentiated twice. One with a method
        ``streams(rows) -> bool`` that answers True gets the rows as they arrived, ``w g_i`` in the outputs' dtype, and
        an argument ``weight``: w, no dimensions (None: 1); it gives back ``w step_i``, in the same dtype.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """The running state as plain types and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        ...


def check_power(power: Any) -> float:
    """1 or 0.5, as a float."""
    check_choice("power", float(power) if type(power) is int else power, (1.0, 0.5))
    return float(power)


def describe(curvature: Any) -> str:
    """``repr`` of a curvature by its arguments; refresh_every only where it does something."""
    kept = f", refresh_every={curvature.refresh_every}" if curvature.refresh_every > 1 else ""
    return f"{type(curvature).__name__}(structure={curvature.structure!r}, power={curvature.power:g}{kept})"


def check_groups(n: int, groups: int) -> None:
    """Raise :class:`ShapeError` unless n rows are the same number of rows for each of ``groups`` blocks."""
    if groups < 1 or n % groups:
        raise ShapeError(f"groups must divide the rows of the outputs; got {groups} groups for {n} rows.")
