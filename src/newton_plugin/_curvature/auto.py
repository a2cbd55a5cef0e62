"""``curvature="auto"``: the Hessian where it is known or cheap, Fisher elsewhere."""

from __future__ import annotations

import logging

from torch import Tensor

from newton_plugin._curvature.damping import Damping
from newton_plugin._curvature.hessian import Hessian
from newton_plugin._curvature.protocol import HVP, CurvatureStep, Structure
from newton_plugin._curvature.sizes import AUTO_FEATURES
from newton_plugin._derivatives.independence import COUPLED
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._errors import BatchCoupledError, OutputsTooLargeError, TransformError
from newton_plugin._runtime.processes import ONE_PROCESS, Ranks
from newton_plugin._runtime.transforms import readable

__all__ = ["AutoCurvature"]

_LOGGER = logging.getLogger("newton_plugin")


class AutoCurvature(Hessian):
    """The Hessian where it exists and is cheap, Fisher elsewhere.

    A Hessian is cheap if it is known without products (cross-entropy, squared errors, the sorting losses), at any m, or
    if it takes m products and m is at most ``AUTO_FEATURES``. What was chosen, and why, is logged whenever it
    changes ("newton_plugin", INFO); a choice of Fisher is also the step's ``fallback``.
    """

    def __init__(self, structure: Structure = "mean", power: float = 1, refresh_every: int = 1) -> None:
        super().__init__(structure, power, refresh_every)
        self._coupled = False
        self._chosen = ""

    def wants_hessian(self, features: int | None = None) -> bool:
        """Whether the next step would use Hessian-vector products of outputs with so many features."""
        affordable = features is None or features <= AUTO_FEATURES
        return super().wants_hessian(features) and affordable and not self._coupled

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
        m = gradient.shape[1]
        groups = groups if self.structure == "block" else 1
        if self._kept.serves(m, groups):
            return self._from_kept(gradient, None)
        known = hvp is not None and SampleHessians.of(hvp).known
        if m > AUTO_FEATURES and ranks.worst(0 if known else 1):
            reason = f"{m} features would take {m} Hessian-vector products a step"
        elif self._coupled:  # found at an earlier step
            reason = COUPLED
        elif hvp is not None and not known and not readable(gradient):
            raise TransformError(
                "curvature='auto' looks at the numbers to see whether the loss couples its samples, which it cannot "
                "under vmap or torch.compile. Name one: curvature='hessian' or 'fisher'."
            )
        else:
            try:
                result = super().step(gradient, hvp, damping, ranks, groups, live)
                self._log(result.fallback or f"the Hessian, {'in closed form' if known else f'from {m} products'}")
                return result
            except BatchCoupledError:
                self._coupled, reason = True, COUPLED
            except OutputsTooLargeError as error:
                reason = str(error)
        self._log(reason)
        return self._fall_back(gradient, damping, reason, ranks, groups, live)

    def _log(self, choice: str) -> None:
        if choice != self._chosen:
            self._chosen = choice
            _LOGGER.info("curvature='auto': %s", choice)
