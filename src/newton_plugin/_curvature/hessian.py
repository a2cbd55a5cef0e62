"""The Hessian of the loss with respect to the outputs, in whatever form is affordable.

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

Where the reasoning fails that makes one product serve all samples, it is noticed: a probe with random signs per sample
detects a loss that couples samples, and a Hessian that does not exist (or is zero, as for piecewise linear losses)
hands over to Fisher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newton_plugin._curvature.damping import Damping, damping_for
from newton_plugin._curvature.fisher import EmpiricalFisher, batch_fisher
from newton_plugin._curvature.hessian_per_sample import per_sample_step, probe_samples
from newton_plugin._curvature.protocol import (
    HVP,
    STRUCTURES,
    CurvatureStep,
    Structure,
    check_groups,
    check_power,
    describe,
)
from newton_plugin._curvature.refresh import Kept, check_refresh_every
from newton_plugin._curvature.running_mean import RunningMean
from newton_plugin._curvature.sizes import DENSE_FEATURES, form_is_dense, refuse_if_too_large
from newton_plugin._derivatives.hessian_sums import DirectForms, dense_sum, diagonal_sum, probe_sum, trace_sum
from newton_plugin._derivatives.independence import samples_are_independent
from newton_plugin._derivatives.sample_hessians import HessianUnavailable
from newton_plugin._errors import BatchCoupledError, NewtonPluginError, OutputsTooLargeError, check_choice
from newton_plugin._linalg.diagonal_low_rank import DiagonalLowRank
from newton_plugin._linalg.diagonal_rank_one import DiagonalRankOne, rank_one
from newton_plugin._linalg.krylov import KrylovOptions, check_krylov
from newton_plugin._linalg.matrices import Dense, Diagonal, Form, Isotropic
from newton_plugin._linalg.sketch import probes_for, sketch
from newton_plugin._runtime.processes import ONE_PROCESS, Ranks

__all__ = [
    "Hessian",
]


_KNOWN_DIAGONAL, _KNOWN, _BLOCKS, _PRODUCTS, _NONE, _REFUSED = range(6)  # what a rank has, best first
# Up to so many features the mean is formed; above, it is sketched by 32 products.
_FORMED = {_BLOCKS: 1024, _PRODUCTS: 256}


class Hessian:
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
        self._kept = Kept(self.refresh_every, self.power)
        self._independent = False

    def __repr__(self) -> str:
        return describe(self)

    def wants_hessian(self, features: int | None = None) -> bool:
        """Whether the next step uses second derivatives; False between refreshes."""
        return self._kept.due

    def step(
        self, gradient: Tensor, hvp: HVP | None, damping: Damping, ranks: Ranks = ONE_PROCESS, groups: int = 1
    ) -> CurvatureStep:
        """See :meth:`newton_plugin.Curvature.step`."""
        n, m = gradient.shape
        if self.structure != "block":
            groups = 1
        check_groups(n, groups)
        if not self._kept.due and self._kept.fits(m, groups):
            return self._from_kept(gradient, None)
        forms, probed, reason, refusal = self._try(hvp, gradient, damping, groups)
        if hvp is None and self._kept.form is not None:
            reason = "the C that is kept is of outputs of another shape"
        worst = ranks.worst(_REFUSED if refusal else _NONE if forms is None else _kind(forms))
        if worst == _REFUSED:
            raise refusal or BatchCoupledError("another rank refuses the Hessian of its part of the batch; see there.")
        if worst == _NONE or forms is None:
            return self._fall_back(gradient, damping, reason or "there is none on another rank", ranks, groups)
        if self.structure == "per_sample":
            return per_sample_step(forms, probed, gradient, damping, self.power, self.krylov, self._mean, ranks)
        if self.structure == "mean" and worst == _KNOWN and not form_is_dense(n, m, damping, ranks):
            assert forms.diagonal_rank_one is not None
            form, finite, zero = self._low_rank(forms.diagonal_rank_one, gradient, damping, ranks)
        elif self.structure == "mean" and worst == _KNOWN_DIAGONAL and m > DENSE_FEATURES:
            form, finite, zero = self._average(diagonal_sum(forms, gradient), Diagonal, gradient, damping, ranks, 1)
        elif self.structure == "mean" and m > _FORMED.get(worst, m):
            y = ranks.mean(probe_sum(forms, gradient, probes_for(gradient)) if probed is None else probed, n)
            zero = (y == 0).all()
            if bool(zero):
                return self._substitute(gradient, damping, zero, ranks)
            average = damping.averaging
            y = self._mean.update(y, average.decay, average.growth)
            form, finite = sketch(probes_for(gradient), y), self._mean.finite
        else:
            total = self._sum(forms, gradient, damping, groups) if probed is None else probed
            kind = {"isotropic": Isotropic, "diagonal": Diagonal}.get(self.structure, Dense)
            form, finite, zero = self._average(total, kind, gradient, damping, ranks, groups)
        self._kept.put(form, damping_for(damping, form.scale, gradient), finite, m, groups)
        return self._from_kept(gradient, zero)

    def _try(
        self, hvp: HVP | None, gradient: Tensor, damping: Damping, groups: int
    ) -> tuple[DirectForms | None, Tensor | None, str, NewtonPluginError | None]:
        """This rank's Hessians, and what their products are needed for; or why there are none; or what refuses them."""
        if hvp is None:
            return None, None, "no Hessian-vector product was given", None
        try:
            refuse_if_too_large(hvp, gradient, self.structure, groups, self.krylov)
            if not self._independent:
                self._independent = getattr(hvp, "independent", False) or samples_are_independent(hvp, gradient)
            forms = DirectForms.of(hvp, gradient)
            return forms, None if forms.known else self._sum(forms, gradient, damping, groups), "", None
        except HessianUnavailable as error:
            return None, None, str(error), None
        except (BatchCoupledError, OutputsTooLargeError) as error:
            return None, None, "", error

    def _sum(self, forms: DirectForms, gradient: Tensor, damping: Damping, groups: int) -> Tensor:
        """What is added over samples and ranks."""
        m = gradient.shape[1]
        if self.structure == "per_sample":
            return probe_samples(forms, gradient, damping)
        if self.structure == "isotropic":
            return trace_sum(forms, gradient) / m
        if self.structure == "diagonal":
            return diagonal_sum(forms, gradient)
        if self.structure == "mean" and m > _FORMED[_PRODUCTS] and not forms.known:
            return probe_sum(forms, gradient, probes_for(gradient))
        return dense_sum(forms, gradient, groups)

    def _average(
        self, total: Tensor, kind: type, gradient: Tensor, damping: Damping, ranks: Ranks, groups: int
    ) -> tuple[Form, Tensor | None, Tensor]:
        """The running mean of the batches' means; the batch's Fisher in place of a Hessian that is zero."""
        c = ranks.mean(total, gradient.shape[0] // groups)
        zero = (c == 0).all()
        # Several ranks look first: the substitute is another all-reduce. So do large C, whose substitute is work.
        look = ranks.many or (c.ndim > 1 and gradient.shape[1] > DENSE_FEATURES)
        if not (look and not bool(zero)):
            c = torch.where(zero, batch_fisher(gradient, ranks, groups, c.ndim), c)
        average = damping.averaging
        return kind(self._mean.update(c, average.decay, average.growth)), self._mean.finite, zero

    def _low_rank(
        self, form: DiagonalRankOne, gradient: Tensor, damping: Damping, ranks: Ranks
    ) -> tuple[Form, Tensor, Tensor]:
        """``diag(mean D) - Q' Q``, rescaled to the running mean of its scale, as Fisher's N x N way."""
        weight, vector = rank_one(form)
        n, m = gradient.shape
        diagonal = ranks.mean(form.diagonal.expand(n, m).sum(0), n)
        rows, _ = ranks.rows(vector)
        weight = ranks.rows(weight.unsqueeze(-1))[0].squeeze(-1) if ranks.many else weight
        norms = weight.abs() * torch.linalg.vecdot(rows, rows)
        finite = torch.isfinite(diagonal).all() & torch.isfinite(norms).all()
        zero = (diagonal == 0).all() & (norms == 0).all()
        factor = diagonal.new_full((), -1.0)
        if bool(zero):  # the batch's Fisher in its place
            rows, weight, factor = ranks.rows(gradient)[0], torch.ones_like(weight), -factor
        c = DiagonalLowRank(diagonal, rows, (weight / len(rows)).sqrt(), factor)
        average = damping.averaging
        if average.decay == 0:
            return c, finite, zero
        own = c.scale()
        ratio = torch.where(own > 0, self._mean.update(own, average.decay, average.growth) / own, 1.0)
        return DiagonalLowRank(diagonal * ratio, rows, c.roots, factor * ratio), finite, zero

    def _substitute(self, gradient: Tensor, damping: Damping, zero: Tensor, ranks: Ranks) -> CurvatureStep:
        result = self._fisher.step(gradient, None, damping, ranks)
        result.zero_hessian = zero
        return result

    def _from_kept(self, gradient: Tensor, zero: Tensor | None) -> CurvatureStep:
        inverse, form, d = self._kept.use(gradient.device)
        finite = self._kept.finite
        return CurvatureStep(inverse(gradient), d, form.matrix, form.extremes, zero_hessian=zero, finite=finite)

    def _fall_back(self, gradient: Tensor, damping: Damping, reason: str, ranks: Ranks, groups: int) -> CurvatureStep:
        result = self._fisher.step(gradient, None, damping, ranks, groups)
        result.fallback = reason
        return result

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
        """Take over what :meth:`state_dict` gave."""
        self._mean.load_state_dict(state["mean"])
        self._fisher.load_state_dict(state["fisher"])
        self._independent = state["independent"]
        self._kept.load_state_dict(state.get("kept", {}))


def _kind(forms: DirectForms) -> int:
    form = forms.diagonal_rank_one
    if form is None:
        return _PRODUCTS if forms.blocks is None else _BLOCKS
    if form.weight is None:
        return _KNOWN_DIAGONAL
    # A negative weight has no square root; looked at where Woodbury could be used, which waits for the device anyway.
    if forms.m > DENSE_FEATURES and bool((form.weight < 0).any()):
        return _BLOCKS
    return _KNOWN
