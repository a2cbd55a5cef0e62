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
whether directions matter at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from newton_plugin._damping import AutoDamping, Averaging, Damping, damping_for
from newton_plugin._errors import ShapeError, check_choice, check_positive
from newton_plugin._forms import Dense, Diagonal, Isotropic, to_blocks
from newton_plugin._kept import Kept, check_refresh_every
from newton_plugin._memory import refuse_beyond
from newton_plugin._ranks import ONE_PROCESS, Ranks
from newton_plugin._running import RunningMean
from newton_plugin._sample_hessians import HVP
from newton_plugin._sketch import sketch_of_rows
from newton_plugin._solve import finite_or_identity, solve_push_through

__all__ = [
    "HVP",
    "Curvature",
    "CurvatureStep",
    "EmpiricalFisher",
    "SoftNormalization",
    "Structure",
    "check_power",
]

Structure = Literal["mean", "per_sample", "isotropic", "diagonal", "block"]
STRUCTURES = ("mean", "per_sample", "isotropic", "diagonal", "block")

# Where N < m, an N x N system takes the place of the m x m one. Measured at N = 128, float64, one core: forming and
# solving C costs 0.4 ms at m = 100, 1.5 at 200, 50 at 1,000, against 1.5 and 5.4 for the N x N system at 200 and 1,000.
# Up to DENSE_FEATURES C is formed in any case; up to AVERAGED_FEATURES its running mean is worth its 3 ms.
DENSE_FEATURES = 128
AVERAGED_FEATURES = 256


@dataclass
class CurvatureStep:
    """What a curvature gives back for one batch.

    Attributes:
        step: (N, m).
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

        A curvature with an attribute ``structure`` equal to "block" gets one argument more, ``groups``: T, where the
        rows are those of T positions in each sample, (N T, m), sample by sample. One with a method
        ``wants_hessian(features) -> bool`` is asked before the loss is differentiated twice.
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


def form_is_dense(n: int, m: int, damping: Damping, ranks: Ranks) -> bool:
    """Whether the mean C of n samples (of all ranks) is formed, or goes by a system of N x N."""
    dense = AVERAGED_FEATURES if damping.averaging.decay else DENSE_FEATURES
    return m <= dense or ranks.count(n) >= m


def batch_fisher(gradient: Tensor, ranks: Ranks, groups: int, ndim: int) -> Tensor:
    """The batch's ``1/N sum_i g_i g_i'``: tr / m of it (ndim 0), its diagonal (1), all of it (2) or by groups (3)."""
    n, m = gradient.shape
    if ndim == 0:
        return ranks.mean(torch.linalg.vector_norm(gradient).square() / m, n)
    if ndim == 1:
        return ranks.mean(gradient.square().sum(0), n)
    if ndim == 2:
        return ranks.mean(gradient.mT @ gradient, n)
    rows = to_blocks(gradient, groups)
    return ranks.mean(rows.mT @ rows, n // groups)


def check_groups(n: int, groups: int) -> None:
    """Raise :class:`ShapeError` unless n rows are the same number of rows for each of ``groups`` blocks."""
    if groups < 1 or n % groups:
        raise ShapeError(f"groups must divide the rows of the outputs; got {groups} groups for {n} rows.")


class EmpiricalFisher:
    """``C = 1/N sum_i g_i g_i'``: needs gradients only, is never indefinite.

    Where the loss is a log-likelihood it estimates the Fisher information. It scales with the *square* of
    the loss, so with power 1 a loss times c gives a step divided by c; an optimizer that normalises (Adam)
    does not notice.

    Args:
        structure: "mean", "per_sample", "isotropic", "diagonal" or "block".
        power: 1, or 0.5 for ``(C + d I)^-1/2 g``.
        refresh_every: steps for which C and its factorisation are used; 1: C is new at every step.

    With structure "mean" and N < m, C is not formed above 128 features: the step goes through an N x N system in
    O(N m) memory, and is the same step. Where the damping averages C over batches ("auto"), C is formed up to 256
    features; above that (and N < m) it is the batch's own C, rescaled to the running mean of its scale.

    Raises:
        OutputsTooLargeError: at a step whose dense blocks would take more than 2 GiB.
    """

    needs_hessian = False

    def __init__(self, structure: Structure = "mean", power: float = 1, refresh_every: int = 1) -> None:
        check_choice("structure", structure, STRUCTURES)
        self.structure: Structure = structure
        self.power = check_power(power)
        self.refresh_every = check_refresh_every(refresh_every, structure)
        self._mean = RunningMean()
        self._kept = Kept(self.refresh_every, self.power)

    def __repr__(self) -> str:
        return describe(self)

    def step(
        self, gradient: Tensor, hvp: HVP | None, damping: Damping, ranks: Ranks = ONE_PROCESS, groups: int = 1
    ) -> CurvatureStep:
        """See :meth:`Curvature.step`; ``hvp`` is not used."""
        n, m = gradient.shape
        if self.structure == "per_sample":
            return self._per_sample(gradient, damping, ranks)
        if self.structure != "block":
            groups = 1
        check_groups(n, groups)
        kept = self._kept
        refreshed = kept.due or not kept.fits(m, groups)
        if refreshed:
            if groups == 1 and self.structure in ("mean", "block") and not form_is_dense(n, m, damping, ranks):
                return self._push_through(gradient, damping, ranks)
            if groups > 1:
                asked = f"curvature='fisher' with structure='block', {groups} blocks of {m} features each,"
                refuse_beyond(groups * m * m, asked, "a C", "Use structure='mean' or 'diagonal' (O(N m) memory).")
            average = damping.averaging
            ndim = {"isotropic": 0, "diagonal": 1}.get(self.structure, 2 if groups == 1 else 3)
            c = self._mean.update(batch_fisher(gradient, ranks, groups, ndim), average.decay, average.growth)
            form = (Isotropic, Diagonal)[ndim](c) if ndim < 2 else Dense(c, definite=True)
            kept.put(form, damping_for(damping, form.scale, gradient), self._mean.finite, m, groups)
        return self._from_kept(gradient, damping, refreshed)

    def _from_kept(self, gradient: Tensor, damping: Damping, refreshed: bool) -> CurvatureStep:
        solved, form, d = self._kept.solve(gradient)
        step = self._with_own(solved, gradient, damping)
        # Of a C that was kept, the ranks know nothing about the gradients of this batch.
        return CurvatureStep(step, d, form.matrix, form.extremes, finite=self._kept.finite, agreed=refreshed)

    def _with_own(self, step: Tensor, gradient: Tensor, damping: Damping) -> Tensor:
        """The step with the sample's own ``w g g'`` added to C, by the formula of Sherman and Morrison:

        ``(A + w g g')^-1 g = A^-1 g / (1 + w g' A^-1 g)``.
        """
        weight = damping.averaging.own / gradient.shape[1]
        if self.power != 1 or weight == 0:
            return step
        return step / (1 + weight * (gradient * step).sum(-1, keepdim=True))

    def _per_sample(self, gradient: Tensor, damping: Damping, ranks: Ranks) -> CurvatureStep:
        # g is an eigenvector of g g' with eigenvalue |g|^2, so (g g' + d I)^-p g = (|g|^2 + d)^-p g.
        d = damping.value(self._running_size(gradient, damping, ranks)[0])
        squared = torch.linalg.vecdot(gradient, gradient).unsqueeze(-1)
        rank_deficient = gradient.shape[1] > 1
        return CurvatureStep(
            gradient * (squared + d).pow(-self.power),
            d,
            None,
            lambda: (torch.zeros_like(d) if rank_deficient else squared.min(), squared.max()),
            finite=self._mean.finite,
            agreed=True,
        )

    def _running_size(self, gradient: Tensor, damping: Damping, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """tr(C) / m, averaged over batches, and of this batch alone."""
        n, m = gradient.shape
        own = ranks.mean(torch.linalg.vector_norm(gradient).square() / m, n)
        average = damping.averaging
        return self._mean.update(own, average.decay, average.growth), own

    def _push_through(self, gradient: Tensor, damping: Damping, ranks: Ranks) -> CurvatureStep:
        # An m x m running mean would cost more than the rest of the step; the batch's C is rescaled to the running
        # size instead.
        size, own_size = self._running_size(gradient, damping, ranks)
        rows, own = ranks.rows(gradient)
        n, m = rows.shape
        weight = torch.where(own_size > 0, size / own_size, 1.0) / n
        gram = finite_or_identity(rows @ rows.mT) * weight
        # G'G and GG' share their eigenvalues.
        d = damping_for(damping, lambda: torch.linalg.matrix_norm(gram) / m**0.5, gradient)
        if self.refresh_every > 1:
            self._kept.put(sketch_of_rows(rows, gram, weight), d, self._mean.finite, m, 1)
            return self._from_kept(gradient, damping, refreshed=True)
        step = self._with_own(solve_push_through(rows, gram, d, self.power)[own], gradient, damping)
        extremes = lambda: (torch.zeros_like(d), torch.linalg.eigvalsh(gram).max())  # noqa: E731
        return CurvatureStep(step, d, None, extremes, finite=self._mean.finite, agreed=True)

    def state_dict(self) -> dict[str, Any]:
        """The running mean of C, and the C that is kept for the next steps."""
        kept = self._kept.state_dict()
        return self._mean.state_dict() | ({"kept": kept} if kept else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._mean.load_state_dict(state)
        self._kept.load_state_dict(state.get("kept", {}))


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

    def step(
        self, gradient: Tensor, hvp: HVP | None, damping: Damping, ranks: Ranks = ONE_PROCESS, groups: int = 1
    ) -> CurvatureStep:
        """See :meth:`Curvature.step`; ``hvp`` is not used."""
        own = _BatchRelative(self.c * gradient.shape[1]) if isinstance(damping, AutoDamping) else damping
        return super().step(gradient, hvp, own, ranks)
