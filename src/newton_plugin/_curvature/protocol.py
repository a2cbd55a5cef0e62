r"""Curvatures: from per-sample gradients (and Hessian-vector products) to the step in output space.

A curvature answers one question: given ``g_i`` and, if it asks for them, products ``H_i v``, what is
``step_i = (C + damping I)^-power g_i``? It returns the *step* and not the matrix, so that a curvature that never
forms C fits beside those that do. One family:

=====================  ==========================================  ==============================
curvature              C                                           also known as
=====================  ==========================================  ==============================
``Hessian``            ``1/N sum_i H_i``                           Newton, at the loss
``EmpiricalFisher``    ``1/N sum_i g_i g_i'``                      natural gradient, at the loss
``SoftNormalization``  ``g_i g_i'`` for each sample, power 1/2     smooth per-sample normalisation
=====================  ==========================================  ==============================

``structure`` says how much of C is kept:

===============  ================================================================================================
structure        C
===============  ================================================================================================
"mean"           one m x m matrix for the batch (the paper's)
"per_sample"     one matrix for each sample
"block"          one for each position where feature_dims leave several: outputs (N, T, V) with feature_dims=-1
                 have T matrices V x V
"diagonal"       the diagonal of the mean
"isotropic"      ``(tr C / m) I``: the control which shows whether directions matter at all, and the default
                 (docs/when-it-helps.md)
===============  ================================================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from newton_plugin._curvature.damping import Damping
from newton_plugin._curvature.finiteness import Finiteness
from newton_plugin._curvature.overriding import arguments_of, holds
from newton_plugin._curvature.statistics import Statistics
from newton_plugin._derivatives.sample_hessians import HVP, SampleHessians
from newton_plugin._errors import ShapeError, check_choice
from newton_plugin._runtime.processes import Ranks

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


def _no_eigenvalues() -> tuple[Tensor, Tensor]:
    unknown = torch.tensor(float("nan"))
    return unknown, unknown


@dataclass
class CurvatureStep:
    """What a curvature returns for one batch. A curvature of your own fills in the first two and leaves the rest.

    Attributes:
        step: (N, m); see ``weight`` in :meth:`Curvature.step`.
        damping: what was added to C; no dimensions.
        matrix: C as it was used: (m, m); by structure (N, m, m) per sample, (T, m, m) for blocks, (m,) if diagonal,
            no dimensions if isotropic; None where it was never formed.
        extremes: smallest and largest eigenvalue of C, computed only when called; NaN if nobody knows them.
        fallback: why a simpler curvature took this one's place; empty if none did.
        zero_hessian: True where the batch's Hessian was zero throughout and Fisher took its place; a tensor
            without dimensions, to be read when the host waits anyway. None: not checked.
        finiteness: what is known of the finiteness of C, gradients and steps; nothing by default, and all is checked.
        sizes: ``sum |g_i|^2`` and ``sum |step_i|^2`` for people, computed only when called; None: from the rows.
        readings: further numbers for people, without dimensions, by name.
    """

    step: Tensor
    damping: Tensor
    matrix: Tensor | None = None
    extremes: Callable[[], tuple[Tensor, Tensor]] = _no_eigenvalues
    fallback: str = ""
    zero_hessian: Tensor | None = None
    finiteness: Finiteness = field(default_factory=Finiteness)
    sizes: Callable[[], tuple[Tensor, Tensor]] | None = None
    readings: Mapping[str, Tensor] = field(default_factory=dict)


class Curvature(ABC):
    """A rule from derivatives to the step in output space. Your own is a subclass with one method, :meth:`step`.

    Attributes:
        needs_hessian: whether :meth:`step` uses Hessian-vector products.
        structure: how much of C is kept. Only "block" matters to others: :meth:`step` then gets ``groups``.
        memoryless: whether the optimizer moves in proportion to its gradients, as SGD does; a door that knows sets it.
        reading_names: the names of :attr:`CurvatureStep.readings`, the same at every step.
        refresh_every: tells others for how many steps one C is used. A curvature of your own keeps its C itself.

    Example:
        Steps of length one, whatever the gradient:

        >>> import torch, newton_plugin as npl
        >>> class UnitLength(npl.Curvature):
        ...     def step(self, gradient, hvp, damping):
        ...         length = gradient.norm(dim=-1, keepdim=True)
        ...         return npl.CurvatureStep(gradient / length, damping=length.new_zeros(()))
        >>> y = torch.tensor([[3.0, 4.0]])
        >>> npl.newton_step(lambda y: y.square().sum() / 2, y, curvature=UnitLength()).step
        tensor([[0.6000, 0.8000]])
    """

    needs_hessian: bool = False
    structure: Structure = "mean"
    refresh_every: int = 1
    reading_names: tuple[str, ...] = ()
    memoryless: bool = False
    takes_ranks: ClassVar[bool] = False
    takes_weight: ClassVar[bool] = False
    takes_live: ClassVar[bool] = False
    takes_factor: ClassVar[bool] = False
    takes_head: ClassVar[bool] = False
    names_statistics: ClassVar[bool] = False
    names_knowledge: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # What step() is given beyond its first three arguments: read once, where the class is defined.
        super().__init_subclass__(**kwargs)
        arguments = arguments_of(cls.step)
        cls.takes_ranks = "ranks" in arguments
        cls.takes_live = "live" in arguments
        cls.takes_weight = "weight" in arguments and holds(cls, "streams", "step")
        cls.takes_factor = "factor" in arguments and cls.takes_weight
        cls.takes_head = "head" in arguments
        cls.names_statistics = holds(cls, "statistics", "step")
        cls.names_knowledge = holds(cls, "knowledge", "step")

    @abstractmethod
    def step(self, gradient: Tensor, hvp: HVP | None, damping: Damping) -> CurvatureStep:
        """The step of every sample.

        Args:
            gradient: (N, m), the per-sample gradients ``g_i``, float64 where the device has it.
            hvp: Hessian-vector products, (K, N, m) -> (K, N, m); None if :meth:`wants_hessian` answers False, except
                that a Hessian in closed form is given wherever ``refresh_every`` is 1.
            damping: the rule for the damping.

        A method with an argument of one of these names gets it too:

        * ``ranks``: the processes that share the batch. ``ranks.mean(total, N)`` is the sum of ``total`` over the
          processes, divided by the sum of their N; N is a number or a tensor. A curvature without this argument works
          in one process, or with sync=False.
        * ``groups``, which structure "block" has to take: T, where the rows are those of T positions in each sample,
          (N T, m), sample by sample.
        * ``live``: the number of rows that have a gradient, no dimensions; None: all. Others belong to samples that the
          loss ignores, and should not count in a mean over samples. The gradients are scaled for these samples alone.
        * ``weight``, if the class that defines this method, or a subclass, also defines a :meth:`streams` that answers
          True. It gets the rows as they arrived, ``w g_i`` in the outputs' dtype, and w, no dimensions (None: 1); it
          returns ``w step_i``, in the same dtype.
        * ``head``: the last layer's inputs and the gradients at its outputs, for each sample: an object with
          ``gradients`` (N, P, k), in the unit of the rows, and ``inputs`` (N, P, d), P positions a sample; None where
          no last layer is seen.
        * ``factor``, beside ``weight``: f, no dimensions (None: 1). It then returns ``f w step_i``, rounded once; and
          it also gets rows in half precision.
        """

    def wants_hessian(self, features: int) -> bool:
        """Whether the next step uses Hessian-vector products of outputs with so many features."""
        return self.needs_hessian

    def streams(self, gradient: Tensor) -> bool:
        """Whether the next step takes these rows in their own dtype, with their weight; see :meth:`step`."""
        return False

    def initial_state(
        self,
        gradient: Tensor,
        damping: Damping,
        groups: int = 1,
        hessians: SampleHessians | None = None,
    ) -> dict[str, Any]:
        """The state before the first step, in the form of :meth:`state_dict` after it; see ``npl.functional``.

        Args:
            gradient: rows like those of the steps, (N, m); only shape, dtype and device matter.
            damping: the rule for the damping.
            groups: rows of one sample.
            hessians: those of a batch, where the form of the state depends on what is known of them.
        """
        return self.state_dict()

    @property
    def looks(self) -> bool:
        """Whether :meth:`step` uses the ``head`` that it takes; finding it costs something at every step."""
        return True

    @property
    def one_number(self) -> bool:
        """Whether :meth:`statistics` names one number at every step, whatever the outputs."""
        return False

    def statistics(
        self, gradient: Tensor, damping: Damping, ranks: Ranks, groups: int = 1, live: Tensor | None = None
    ) -> Statistics | None:
        """What the next step will ask ``ranks.mean`` for, named before it: the numbers of all layers travel together.

        Called where there are several processes, with what :meth:`step` gets. A step that passes the same tensor
        ``total`` to ``ranks.mean`` then gets the answer at once. None: the step asks as it goes. It counts only if no
        class further down defines :meth:`step`.
        """
        return None

    def knowledge(self, gradient: Tensor, hvp: HVP | None, damping: Damping, groups: int = 1) -> int | None:
        """As :meth:`statistics`: the code, 0 to 5, that the next step will pass to ``ranks.worst``; None: none."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """The running state as plain types and tensors; empty by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - nothing to restore by default
        """Restore what :meth:`state_dict` gave."""


def check_power(power: Any) -> float:
    """1 or 0.5, as a float."""
    check_choice("power", float(power) if type(power) is int else power, (1.0, 0.5))
    return float(power)


def describe(curvature: Any) -> str:
    """``repr`` of a curvature by its arguments; refresh_every only where it does something."""
    refresh = f", refresh_every={curvature.refresh_every}" if curvature.refresh_every > 1 else ""
    return f"{type(curvature).__name__}(structure={curvature.structure!r}, power={curvature.power:g}{refresh})"


def check_groups(n: int, groups: int) -> None:
    """Raise :class:`ShapeError` unless n rows are the same number of rows for each of ``groups`` blocks."""
    if groups < 1 or n % groups:
        raise ShapeError(f"groups must divide the rows of the outputs; got {groups} groups for {n} rows.")
