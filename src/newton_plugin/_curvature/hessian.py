"""The Hessian of the loss with respect to the outputs, as cheaply as it can be had.

================  ===========================================  ==================================================
structure         small outputs                                large outputs
================  ===========================================  ==================================================
"mean"            m products, dense C (m <= 256)               a sketch: 32 products; cross-entropy and other
                                                               diagonal-plus-rank-one losses: Woodbury, no product
"per_sample"      m products, dense H_i (m <= 128)             Lanczos in lockstep, 5 to 9 products; diagonal plus
                                                               rank one: Sherman and Morrison, no product
"block"           m products, one dense C for each position    refused beyond 2 GiB
"diagonal",       m products (m <= 256)                        8 products (Hutchinson)
"isotropic"
================  ===========================================  ==================================================

A product is one of the whole batch, H_i v_i for every sample. Losses whose Hessians are known
(:class:`newton_plugin._derivatives.sample_hessians.SampleHessians`) need none in any row.

:class:`Hessian` chooses: it refreshes C or uses the one that is kept, and falls back where there is no Hessian.
``hessian_mean`` and ``hessian_per_sample`` compute. Two things can go wrong, and both are noticed. A loss may couple
the samples of a batch, so that one product does not serve all of them: a probe with random signs per sample detects it.
And a Hessian may not exist, or be zero, as for piecewise linear losses: Fisher takes its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from newton_plugin._curvature.batch import Batch
from newton_plugin._curvature.damping import Damping, damping_for
from newton_plugin._curvature.finiteness import Finiteness
from newton_plugin._curvature.fisher import EmpiricalFisher
from newton_plugin._curvature.hessian_mean import Knowledge, mean_hessian, running_shape, summed_hessians
from newton_plugin._curvature.hessian_per_sample import per_sample_step, probe_samples
from newton_plugin._curvature.protocol import (
    HVP,
    STRUCTURES,
    Curvature,
    CurvatureStep,
    Structure,
    check_groups,
    check_power,
    describe,
)
from newton_plugin._curvature.refresh import KeptCurvature, check_refresh_every
from newton_plugin._curvature.running_mean import RunningMean
from newton_plugin._curvature.sizes import refuse_if_too_large
from newton_plugin._derivatives.independence import MOST, coupling, samples_are_independent
from newton_plugin._derivatives.sample_hessians import HessianUnavailable, SampleHessians
from newton_plugin._errors import BatchCoupledError, NewtonPluginError, OutputsTooLargeError, check_choice
from newton_plugin._linalg.krylov import KrylovOptions, check_krylov
from newton_plugin._runtime.processes import ONE_PROCESS, Ranks
from newton_plugin._runtime.transforms import readable

__all__ = ["Hessian"]


@dataclass(frozen=True)
class _Found:
    """What this rank has of the Hessians, or why it has none.

    Attributes:
        knowledge: see :class:`Knowledge`.
        hessians: None if there are none.
        probed: what was computed by products, if they are not known otherwise; see :meth:`Hessian._probe`.
        reason: why there are none.
        refusal: what is raised.
        coupled: whether the loss couples samples, no dimensions, where Python cannot look; see :func:`readable`.
    """

    knowledge: Knowledge
    hessians: SampleHessians | None = None
    probed: Tensor | None = None
    reason: str = ""
    refusal: NewtonPluginError | None = None
    coupled: Tensor | None = None


class Hessian(Curvature):
    """``C = 1/N sum_i H_i``, the second derivatives of the loss; repaired where indefinite.

    Args:
        structure: "mean", "per_sample", "isotropic", "diagonal" or "block".
        power: 1, or 0.5 for ``(C + d I)^-1/2 g``.
        refresh_every: steps for which C and its factorisation are used, and between which the loss is not
            differentiated twice; 1: C is new at every step.
        tolerance: where a per-sample system is solved from Hessian-vector products, the norm of the residual against
            that of the gradient.
        products: most Hessian-vector products of such a step.

    Raises:
        BatchCoupledError: at the first step, if the loss mixes samples of the batch.
        OutputsTooLargeError: at a step whose dense matrices, or Krylov spaces, would take more than 2 GiB.

    A zero or unavailable Hessian falls back to :class:`EmpiricalFisher` of the same structure, and says so.
    """

    needs_hessian = True

    def __init__(
        self,
        structure: Structure = "mean",
        power: float = 1,
        refresh_every: int = 1,
        tolerance: float = KrylovOptions.tolerance,
        products: int = KrylovOptions.most,
    ) -> None:
        check_choice("structure", structure, STRUCTURES)
        self.structure: Structure = structure
        self.power = check_power(power)
        self.refresh_every = check_refresh_every(refresh_every, structure)
        self.krylov = check_krylov(tolerance, products)
        self._mean = RunningMean()
        self._fisher = EmpiricalFisher(structure, power, refresh_every)
        self._kept = KeptCurvature(self.refresh_every, self.power)
        self._independent = False
        self._found: tuple[Tensor, _Found] | None = None  # between knowledge() and step()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_found": None}

    def __repr__(self) -> str:
        return describe(self)

    def wants_hessian(self, features: int | None = None) -> bool:
        """Whether the next step uses second derivatives; False between refreshes."""
        return self._kept.due

    def step(
        self,
        gradient: Tensor,
        hvp: HVP | None,
        damping: Damping,
        ranks: Ranks = ONE_PROCESS,
        groups: int = 1,
        live: Tensor | None = None,
    ) -> CurvatureStep:
        """See :meth:`newton_plugin.Curvature.step`."""
        n, m = gradient.shape
        groups = groups if self.structure == "block" else 1
        check_groups(n, groups)
        if self._kept.serves(m, groups):
            return self._from_kept(gradient, None)
        found = self._found[1] if self._found is not None and self._found[0] is gradient else None
        found, self._found = found or self._find(hvp, gradient, damping, groups), None
        worst = Knowledge(ranks.worst(found.knowledge))
        hessians = found.hessians
        if worst == Knowledge.REFUSED:
            raise found.refusal or BatchCoupledError(
                "another rank refuses the Hessian of its part of the batch; see there."
            )
        if worst == Knowledge.NOTHING or hessians is None:
            reason = found.reason or "there is none on another rank"
            return self._fall_back(gradient, damping, reason, ranks, groups, live)
        batch = Batch(gradient, damping, ranks, groups, live=live)
        if self.structure == "per_sample":
            result = per_sample_step(hessians, found.probed, batch, self.power, self.krylov, self._mean)
        else:
            c = mean_hessian(self.structure, worst, hessians, found.probed, batch, self._mean)
            if c.matrix is None:
                result = self._fisher.step(gradient, None, damping, ranks, live=live)
                result.zero_hessian = c.zero
                return result
            self._kept.put(c.matrix, damping_for(damping, c.matrix.scale, gradient), c.finite, m, groups)
            result = self._from_kept(gradient, c.zero)
        if found.coupled is not None:  # nobody could raise: the step is not taken
            finite = result.finiteness.curvature
            result.finiteness.curvature = ~found.coupled if finite is None else finite & ~found.coupled
        return result

    def knowledge(self, gradient: Tensor, hvp: HVP | None, damping: Damping, groups: int = 1) -> int | None:
        """See :meth:`Curvature.knowledge`."""
        groups = groups if self.structure == "block" else 1
        check_groups(len(gradient), groups)
        if self._kept.serves(gradient.shape[1], groups):
            return None
        found = self._find(hvp, gradient, damping, groups)
        self._found = gradient, found
        return found.knowledge

    def _find(self, hvp: HVP | None, gradient: Tensor, damping: Damping, groups: int) -> _Found:
        """Check this rank's Hessians, and take the products that the step needs: both may show that there are none."""
        if hvp is None:
            shape = "the C that is kept is of outputs of another shape"
            missing = "no Hessian-vector product was given"
            return _Found(Knowledge.NOTHING, reason=missing if self._kept.matrix is None else shape)
        hessians = SampleHessians.of(hvp)
        try:
            refuse_if_too_large(hessians, gradient, self.structure, groups, self.krylov)
            coupled = None
            if not readable(gradient):
                coupled = None if hessians.independent or len(gradient) < 2 else coupling(hessians, gradient) > MOST
            elif not self._independent:
                self._independent = hessians.independent or samples_are_independent(hessians, gradient)
            hessians = hessians.to(gradient)
            probed = None if hessians.known else self._probe(hessians, gradient, damping, groups)
            return _Found(Knowledge.of(hessians, gradient.shape[1]), hessians, probed, coupled=coupled)
        except HessianUnavailable as error:
            return _Found(Knowledge.NOTHING, reason=str(error))
        except (BatchCoupledError, OutputsTooLargeError) as error:
            return _Found(Knowledge.REFUSED, refusal=error)

    def _probe(self, hessians: SampleHessians, gradient: Tensor, damping: Damping, groups: int) -> Tensor:
        """What the step needs of Hessians that are known by their products alone."""
        if self.structure == "per_sample":
            return probe_samples(hessians, gradient, damping)
        return summed_hessians(self.structure, hessians, gradient, groups)

    def _from_kept(self, gradient: Tensor, zero: Tensor | None) -> CurvatureStep:
        inverse, matrix, d = self._kept.use(gradient.device)
        finiteness = Finiteness(self._kept.finite)
        step = inverse(gradient)
        return CurvatureStep(step, d, matrix.matrix, matrix.extremes, zero_hessian=zero, finiteness=finiteness)

    def _fall_back(
        self, gradient: Tensor, damping: Damping, reason: str, ranks: Ranks, groups: int, live: Tensor | None
    ) -> CurvatureStep:
        result = self._fisher.step(gradient, None, damping, ranks, groups, live=live)
        result.fallback = reason
        return result

    def initial_state(
        self, gradient: Tensor, damping: Damping, groups: int = 1, hessians: SampleHessians | None = None
    ) -> dict[str, Any]:
        """See :meth:`Curvature.initial_state`."""
        groups = groups if self.structure == "block" else 1
        mean = {}
        if damping.averaging.decay:
            shape = running_shape(self.structure, gradient, damping, groups, hessians)
            mean = RunningMean.initial_state(shape, gradient)
        fisher = self._fisher.initial_state(gradient, damping, groups)
        no = gradient.new_zeros((), dtype=torch.bool)
        return {"mean": mean, "fisher": fisher, "independent": no}

    def state_dict(self) -> dict[str, Any]:
        """The running means of C and of the Fisher that may take its place, and the C that is kept."""
        kept = self._kept.state_dict()
        return {
            "mean": self._mean.state_dict(),
            "fisher": self._fisher.state_dict(),
            "independent": self._independent,
            **({"kept": kept} if kept else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._mean.load_state_dict(state["mean"])
        self._fisher.load_state_dict(state["fisher"])
        self._independent = state["independent"]
        self._kept.load_state_dict(state.get("kept", {}))
