"""The Hessian of the loss with respect to the outputs, from m Hessian-vector products shared by the batch.

The samples of a batch do not interact in the loss, so the Hessian of the whole-batch loss is block diagonal
and *one* product with the probe ``(e_j, e_j, ..., e_j)`` gives column j of every sample's block. m probes
give all blocks, through class weights, ``ignore_index`` and unreduced losses alike, with no per-sample loop.

Where that reasoning fails it is noticed: a probe with random signs per sample detects a loss that couples
samples, and a Hessian that does not exist (or is zero, as for piecewise linear losses) hands over to Fisher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_plugin._curvature import (
    HVP,
    STRUCTURES,
    CurvatureStep,
    EmpiricalFisher,
    Structure,
    check_power,
    dense_extremes,
    isotropic_step,
)
from newton_plugin._damping import Damping
from newton_plugin._errors import BatchCoupledError, NewtonPluginError, OutputsTooLargeError, check_choice
from newton_plugin._ranks import ONE_PROCESS, Ranks
from newton_plugin._running import RunningMean
from newton_plugin._solve import eigenvalue_scale, finite_or_identity, solve_indefinite, solve_power

__all__ = ["AutoCurvature", "Hessian", "HessianUnavailable"]

MAX_BYTES = 2 * 1024**3
_CHUNK_ELEMENTS = 2**24  # of (K, N, m), probes taken at once
_COUPLED = "the loss couples the samples of a batch, so per-sample Hessians do not exist"
_AUTO_FEATURES = 256  # above this "auto" does not spend m probes a step


class HessianUnavailable(NewtonPluginError, RuntimeError):
    """Raised by a Hessian-vector product that cannot be computed; its message is the cause."""


class Hessian:
    """``C = 1/N sum_i H_i``, the second derivatives of the loss; repaired where indefinite.

    Args:
        structure: "mean", "per_sample" or "isotropic".
        power: 1, or 0.5 for ``(C + d I)^-1/2 g``.

    Raises:
        BatchCoupledError: at the first step, if the loss mixes samples of the batch.
        OutputsTooLargeError: at a step whose dense C would take more than 2 GiB.

    A zero or unavailable Hessian falls back to :class:`EmpiricalFisher` of the same structure, and says so.
    """

    needs_hessian = True

    def __init__(self, structure: Structure = "mean", power: float = 1) -> None:
        check_choice("structure", structure, STRUCTURES)
        self.structure: Structure = structure
        self.power = check_power(power)
        self._mean = RunningMean()
        self._fisher = EmpiricalFisher(structure, power)
        self._independent = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}(structure={self.structure!r}, power={self.power:g})"

    def step(self, gradient: Tensor, hvp: HVP | None, damping: Damping, ranks: Ranks = ONE_PROCESS) -> CurvatureStep:
        """See :meth:`newton_plugin.Curvature.step`."""
        c, reason, refusal = self._try(hvp, gradient)
        worst = ranks.worst(2 if refusal else 1 if c is None else 0)
        if worst == 2:
            raise refusal or BatchCoupledError("another rank refuses the Hessian of its part of the batch; see there.")
        if worst == 1 or c is None:
            return self._fall_back(gradient, damping, reason or "there is none on another rank", ranks)
        if self.structure == "per_sample":
            zero = ranks.all((c == 0).all())
        else:
            c = ranks.mean(c, gradient.shape[0])
            zero = (c == 0).all()
        if not (ranks.many and not bool(zero)):  # several ranks look first: the substitute is another all-reduce
            c = torch.where(zero, _fisher_like(c, gradient, ranks), c)
        return self._solve(c, gradient, damping, zero, ranks)

    def _try(self, hvp: HVP | None, gradient: Tensor) -> tuple[Tensor | None, str, NewtonPluginError | None]:
        """This rank's sum of Hessians; or why there is none; or the error that refuses it."""
        n, m = gradient.shape
        if hvp is None:
            return None, "no Hessian-vector product was given", None
        try:
            refuse_if_too_large(n, m, self.structure)
            if not self._independent:
                self._independent = samples_are_independent(hvp, gradient)
            return self._form(hvp, gradient), "", None
        except HessianUnavailable as error:
            return None, str(error), None
        except (BatchCoupledError, OutputsTooLargeError) as error:
            return None, "", error

    def _fall_back(self, gradient: Tensor, damping: Damping, reason: str, ranks: Ranks) -> CurvatureStep:
        result = self._fisher.step(gradient, None, damping, ranks)
        result.fallback = reason
        return result

    def _form(self, hvp: HVP, gradient: Tensor) -> Tensor:
        """The samples' own H (N, m, m), or by structure their sum (m, m), or ``tr / m`` of that."""
        n, m = gradient.shape
        basis = torch.eye(m, dtype=gradient.dtype, device=gradient.device)
        probes = max(1, _CHUNK_ELEMENTS // max(1, n * m))
        parts = []
        for first in range(0, m, probes):
            chunk = basis[first : first + probes]
            products = hvp(chunk.unsqueeze(1).expand(-1, n, -1)) if n else gradient.new_zeros(len(chunk), 0, m)
            if self.structure == "per_sample":
                parts.append(products)
            elif self.structure == "mean":
                parts.append(products.sum(1))
            else:
                parts.append((products.sum(1) * chunk).sum(-1))
        c = torch.cat(parts)
        if self.structure == "isotropic":
            return c.mean()
        c = c.movedim(0, -2)
        return (c + c.mT) / 2

    def _solve(self, c: Tensor, gradient: Tensor, damping: Damping, zero: Tensor, ranks: Ranks) -> CurvatureStep:
        average = damping.averaging
        if self.structure == "per_sample":
            finite = torch.isfinite(c).all()
            c = finite_or_identity(c)
            scale = ranks.mean(eigenvalue_scale(c).sum(), gradient.shape[0])
            d = damping.value(self._mean.update(scale, average.decay, average.growth))
            solved = self._dense(c, d, gradient)
            return CurvatureStep(solved, d, c, lambda: dense_extremes(c), zero_hessian=zero, finite=finite)
        c = self._mean.update(c, average.decay, average.growth)
        if self.structure == "isotropic":
            d = damping.value(c.abs())
            solved = isotropic_step(c, d, gradient, self.power)
            return CurvatureStep(solved, d, c, lambda: (c, c), zero_hessian=zero, finite=self._mean.finite)
        d = damping.value(eigenvalue_scale(c))
        solved = self._dense(c, d, gradient)
        return CurvatureStep(solved, d, c, lambda: dense_extremes(c), zero_hessian=zero, finite=self._mean.finite)

    def _dense(self, c: Tensor, d: Tensor, gradient: Tensor) -> Tensor:
        if self.power == 1:
            return solve_indefinite(c, d, gradient)
        return solve_power(c, d, gradient, self.power)

    def state_dict(self) -> dict[str, Any]:
        """The running means of C and of the Fisher that may take its place."""
        return {
            "mean": self._mean.state_dict(),
            "fisher": self._fisher.state_dict(),
            "independent": self._independent,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self._mean.load_state_dict(state["mean"])
        self._fisher.load_state_dict(state["fisher"])
        self._independent = state["independent"]


class AutoCurvature(Hessian):
    """The Hessian where it exists and is cheap (m <= 256, samples independent), Fisher elsewhere.

    What was chosen, and why, is reported once as the step's ``fallback``.
    """

    def __init__(self, structure: Structure = "mean", power: float = 1) -> None:
        super().__init__(structure, power)
        self._coupled = False

    def step(self, gradient: Tensor, hvp: HVP | None, damping: Damping, ranks: Ranks = ONE_PROCESS) -> CurvatureStep:
        """See :meth:`newton_plugin.Curvature.step`."""
        m = gradient.shape[1]
        if m > _AUTO_FEATURES:
            reason = f"{m} features would take {m} Hessian-vector products a step"
            return self._fall_back(gradient, damping, reason, ranks)
        if self._coupled:  # known: no second probe
            return self._fall_back(gradient, damping, _COUPLED, ranks)
        try:
            return super().step(gradient, hvp, damping, ranks)
        except BatchCoupledError:
            self._coupled = True
            return self._fall_back(gradient, damping, _COUPLED, ranks)
        except OutputsTooLargeError as error:
            return self._fall_back(gradient, damping, str(error), ranks)


def refuse_if_too_large(n: int, m: int, structure: Structure) -> None:
    """Raise :class:`OutputsTooLargeError` before allocating a dense C beyond ``MAX_BYTES``."""
    matrices = {"per_sample": n, "mean": 1, "isotropic": 0}[structure]
    needed = 8 * m * m * max(matrices, 1)
    if needed > MAX_BYTES:
        raise OutputsTooLargeError(
            f"curvature='hessian' with structure={structure!r} and outputs of {m} features (N = {n}) needs a "
            f"dense C of {needed / 1024**3:.1f} GiB, more than the limit of {MAX_BYTES / 1024**3:.0f} GiB. "
            "Use curvature='fisher' (O(N m) memory) or 'norm', or name fewer features by feature_dims."
        )


def samples_are_independent(hvp: HVP, gradient: Tensor) -> bool:
    """True if H is block diagonal over samples; raise if it is not; False if that cannot be told yet.

    For independent samples ``H (s * u) = s * (H u)`` for any sign s_i per sample; where sample i's gradient
    depends on sample j's output the two differ (with probability one over u).

    Raises:
        BatchCoupledError: the loss couples samples.
    """
    n, m = gradient.shape
    if n < 2:
        return False
    # A generator of its own: the user's random state is not touched.
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(n, m, generator=generator, dtype=torch.float64).to(gradient)
    signs = (torch.arange(n) % 2 * 2.0 - 1)[torch.randperm(n, generator=generator)].to(gradient).unsqueeze(1)
    together, signed = hvp(torch.stack([u, signs * u]))
    error, size = (signed - signs * together).norm(), together.norm()
    if not bool(torch.isfinite(error)) or not bool(size > 0):
        return False
    if bool(error > 1e-3 * size):
        raise BatchCoupledError(
            f"{_COUPLED} (a Hessian-vector product with random signs per sample "
            f"differs by {float(error / size):.1e} relative). "
            "Use curvature='fisher' or 'norm', or 'auto', which chooses Fisher here. If each sample is "
            "several rows of the outputs, name the feature dimensions by feature_dims."
        )
    return True


def _fisher_like(c: Tensor, gradient: Tensor, ranks: Ranks) -> Tensor:
    """The batch's Fisher in the shape of c: what takes the place of a Hessian that is zero."""
    n, m = gradient.shape
    if c.ndim == 0:
        return ranks.mean(gradient.square().sum() / m, n)
    if c.ndim == 2:
        return ranks.mean(gradient.mT @ gradient, n)
    return gradient.unsqueeze(-1) * gradient.unsqueeze(-2)
