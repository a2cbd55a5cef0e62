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
one for each sample; "isotropic", ``(tr C / m) I``, the control which shows whether directions matter at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from newton_plugin._damping import AutoDamping, Averaging, Damping
from newton_plugin._errors import check_choice, check_positive
from newton_plugin._ranks import ONE_PROCESS, Ranks
from newton_plugin._running import RunningMean
from newton_plugin._solve import (
    eigenvalue_scale,
    finite_or_identity,
    solve_definite,
    solve_power,
    solve_push_through,
)

__all__ = [
    "HVP",
    "Curvature",
    "CurvatureStep",
    "EmpiricalFisher",
    "SoftNormalization",
    "Structure",
    "check_power",
]

Structure = Literal["mean", "per_sample", "isotropic"]
STRUCTURES = ("mean", "per_sample", "isotropic")

HVP = Callable[[Tensor], Tensor]
"""(K, N, m) -> (K, N, m): K probes v for every sample, to ``H_i v_ki``."""

# Up to here a dense float64 C (8 MB) and its running mean are cheap; above, Fisher goes by push-through.
DENSE_FEATURES = 1024


@dataclass
class CurvatureStep:
    """What a curvature gives back for one batch.

    Attributes:
        step: (N, m).
        damping: what was added to C; no dimensions.
        matrix: C as it was used: (m, m), (N, m, m), no dimensions if isotropic, or None where it was
            never formed.
        extremes: smallest and largest eigenvalue of C, computed only when called.
        fallback: why a simpler curvature took this one's place; empty if none did.
        zero_hessian: True where the batch's Hessian was zero throughout and Fisher took its place; a tensor
            without dimensions, to be read when the host waits anyway. None: not looked for.
        finite: whether this batch's C is finite; a tensor without dimensions. Where it is not, the gradient stays as
            it is. None: not looked for.
        agreed: whether ``finite`` is the same on all ranks and covers all their gradients, so that they need not ask
            one another again. A sum of squares over the ranks does: one NaN among the gradients is in it.
    """

    step: Tensor
    damping: Tensor
    matrix: Tensor | None
    extremes: Callable[[], tuple[Tensor, Tensor]]
    fallback: str = ""
    zero_hessian: Tensor | None = None
    finite: Tensor | None = None
    agreed: bool = False


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


def isotropic_step(c: Tensor, damping: Tensor, gradient: Tensor, power: float) -> Tensor:
    """``(c I + d I)^-power g``; a negative c (an indefinite Hessian's trace) is repaired to ``|c|``."""
    shifted = torch.where(c + damping > 0, c + damping, c.abs() + damping)
    return gradient * shifted.pow(-power)


def dense_extremes(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest eigenvalue over all matrices of (..., m, m)."""
    values = torch.linalg.eigvalsh(finite_or_identity(matrix))
    return values.min(), values.max()


class EmpiricalFisher:
    """``C = 1/N sum_i g_i g_i'``: needs gradients only, is never indefinite.

    Where the loss is a log-likelihood it estimates the Fisher information. It scales with the *square* of
    the loss, so with power 1 a loss times c gives a step divided by c; an optimizer that normalises (Adam)
    does not notice.

    Args:
        structure: "mean", "per_sample" or "isotropic".
        power: 1, or 0.5 for ``(C + d I)^-1/2 g``.

    Up to 1,024 features C is formed (and its running mean kept) densely; above that the step goes through
    an N x N system where N < m, in O(N m) memory, and only the scale of C is averaged over batches.
    """

    needs_hessian = False

    def __init__(self, structure: Structure = "mean", power: float = 1) -> None:
        check_choice("structure", structure, STRUCTURES)
        self.structure: Structure = structure
        self.power = check_power(power)
        self._mean = RunningMean()

    def __repr__(self) -> str:
        return f"{type(self).__name__}(structure={self.structure!r}, power={self.power:g})"

    def step(self, gradient: Tensor, hvp: HVP | None, damping: Damping, ranks: Ranks = ONE_PROCESS) -> CurvatureStep:
        """See :meth:`Curvature.step`; ``hvp`` is not used."""
        n, m = gradient.shape
        if self.structure == "mean" and (m <= DENSE_FEATURES or ranks.count(n) >= m):
            return self._dense(gradient, damping, ranks)
        # tr(C) / m, of the batch or averaged over the samples' own C_i: the same number.
        average = damping.averaging
        own_size = ranks.mean(gradient.square().sum() / m, n)
        size = self._mean.update(own_size, average.decay, average.growth)
        if self.structure == "isotropic":
            d = damping.value(size)
            step = self._with_own(isotropic_step(size, d, gradient, self.power), gradient, damping)
            return CurvatureStep(step, d, size, lambda: (size, size), finite=self._mean.finite, agreed=True)
        if self.structure == "per_sample":
            return self._per_sample(gradient, damping.value(size))
        return self._push_through(gradient, own_size, size, damping, ranks)

    def _dense(self, gradient: Tensor, damping: Damping, ranks: Ranks) -> CurvatureStep:
        average = damping.averaging
        c = ranks.mean(gradient.mT @ gradient, gradient.shape[0])
        c = self._mean.update(c, average.decay, average.growth)
        d = damping.value(eigenvalue_scale(c))
        solve = solve_definite(c, d, gradient) if self.power == 1 else solve_power(c, d, gradient, self.power)
        step = self._with_own(solve, gradient, damping)
        return CurvatureStep(step, d, c, lambda: dense_extremes(c), finite=self._mean.finite, agreed=True)

    def _with_own(self, step: Tensor, gradient: Tensor, damping: Damping) -> Tensor:
        """The step with the sample's own ``w g g'`` added to C, by the formula of Sherman and Morrison:

        ``(A + w g g')^-1 g = A^-1 g / (1 + w g' A^-1 g)``.
        """
        weight = damping.averaging.own / gradient.shape[1]
        if self.power != 1 or weight == 0:
            return step
        return step / (1 + weight * (gradient * step).sum(-1, keepdim=True))

    def _per_sample(self, gradient: Tensor, d: Tensor) -> CurvatureStep:
        # g is an eigenvector of g g' with eigenvalue |g|^2, so (g g' + d I)^-p g = (|g|^2 + d)^-p g.
        squared = gradient.square().sum(-1, keepdim=True)
        rank_deficient = gradient.shape[1] > 1
        return CurvatureStep(
            gradient * (squared + d).pow(-self.power),
            d,
            None,
            lambda: (torch.zeros_like(d) if rank_deficient else squared.min(), squared.max()),
            finite=self._mean.finite,
            agreed=True,
        )

    def _push_through(
        self, gradient: Tensor, own_size: Tensor, size: Tensor, damping: Damping, ranks: Ranks
    ) -> CurvatureStep:
        # An m x m running mean would not fit; the batch's C is rescaled to the running size instead.
        rows, own = ranks.rows(gradient)
        n, m = rows.shape
        weight = torch.where(own_size > 0, size / own_size, 1.0) / n
        gram = finite_or_identity(rows @ rows.mT) * weight
        d = damping.value(torch.linalg.matrix_norm(gram) / m**0.5)  # G'G and GG' share their eigenvalues
        step = self._with_own(solve_push_through(rows, gram, d, self.power)[own], gradient, damping)
        extremes = lambda: (torch.zeros_like(d), torch.linalg.eigvalsh(gram).max())  # noqa: E731
        return CurvatureStep(step, d, None, extremes, finite=self._mean.finite, agreed=True)

    def state_dict(self) -> dict[str, Any]:
        """The running mean of C."""
        return self._mean.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._mean.load_state_dict(state)


class _BatchRelative:
    """Damping ``c * mean_j |g_j|^2``, which is ``c m`` times the scale of the per-sample Fisher."""

    averaging = Averaging()

    def __init__(self, ratio: float) -> None:
        self.ratio = ratio

    def value(self, scale: Tensor) -> Tensor:
        return (self.ratio * scale).clamp_min(torch.finfo(scale.dtype).tiny)


class SoftNormalization(EmpiricalFisher):
    """``g_i / sqrt(|g_i|^2 + c mean_j |g_j|^2)``: every sample's gradient at about length one.

    The matrix-free end of the family: the per-sample Fisher at power 1/2 with damping relative to the
    batch. The baseline that any claim for a matrix must beat.

    Args:
        c: how soft; positive. With ``damping="auto"`` the damping is ``c mean_j |g_j|^2``; any other damping
            takes its place.
    """

    def __init__(self, c: float = 0.1) -> None:
        super().__init__(structure="per_sample", power=0.5)
        self.c = check_positive("c", c)

    def __repr__(self) -> str:
        return f"SoftNormalization(c={self.c:g})"

    def step(self, gradient: Tensor, hvp: HVP | None, damping: Damping, ranks: Ranks = ONE_PROCESS) -> CurvatureStep:
        """See :meth:`Curvature.step`; ``hvp`` is not used."""
        own = _BatchRelative(self.c * gradient.shape[1]) if isinstance(damping, AutoDamping) else damping
        return super().step(gradient, hvp, own, ranks)
