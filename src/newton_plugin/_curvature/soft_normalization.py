"""Soft normalisation: the per-sample Fisher at power 1/2, and no matrix."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from newton_plugin._curvature.damping import AutoDamping, BatchRelative, Damping
from newton_plugin._curvature.fisher import EmpiricalFisher
from newton_plugin._curvature.protocol import HVP, CurvatureStep
from newton_plugin._curvature.running_mean import RunningMean
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._errors import check_positive
from newton_plugin._runtime.processes import ONE_PROCESS, Ranks

__all__ = ["SoftNormalization"]


class SoftNormalization(EmpiricalFisher):
    """``g_i / sqrt(|g_i|^2 + c mean_j |g_j|^2)``: every sample's gradient at about length one.

    The matrix-free end of the family: the per-sample Fisher at power 1/2 with damping relative to the
    batch. The baseline that any claim for a matrix must beat. Gradients that are a millionth of what they were are
    taken for rounding, and not brought to length one.

    Args:
        c: how soft; positive. With ``damping="auto"`` the damping is ``c mean_j |g_j|^2``; any other damping
            takes its place.
    """

    def __init__(self, c: float = 0.1) -> None:
        super().__init__(structure="per_sample", power=0.5)
        self.c = check_positive("c", c)
        self._slow = RunningMean(nonnegative=True)

    def __repr__(self) -> str:
        return f"SoftNormalization(c={self.c:g})"

    streams, statistics = EmpiricalFisher.streams, EmpiricalFisher.statistics  # for the step below

    def step(
        self,
        gradient: Tensor,
        hvp: HVP | None,
        damping: Damping,
        ranks: Ranks = ONE_PROCESS,
        groups: int = 1,
        weight: Tensor | None = None,
        live: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> CurvatureStep:
        """See :meth:`Curvature.step`; ``hvp`` is not used."""
        return super().step(gradient, hvp, self._own(damping, gradient.shape[1]), ranks, 1, weight, live, factor)

    def _own(self, damping: Damping, features: int) -> Damping:
        return BatchRelative(self.c * features, self._slow) if isinstance(damping, AutoDamping) else damping

    def initial_state(
        self, gradient: Tensor, damping: Damping, groups: int = 1, hessians: SampleHessians | None = None
    ) -> dict[str, Any]:
        """See :meth:`Curvature.initial_state`."""
        own = self._own(damping, gradient.shape[1])
        state = super().initial_state(gradient, own)
        return state if own is damping else state | {"slow": RunningMean.initial_state((), gradient)}

    def state_dict(self) -> dict[str, Any]:
        """The slow mean of ``|g|^2``."""
        slow = self._slow.state_dict()
        return super().state_dict() | ({"slow": slow} if slow else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        super().load_state_dict(state)
        self._slow.load_state_dict(state.get("slow", {}))
