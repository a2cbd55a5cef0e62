r"""The best candidate of the search for a rule: a curvature between the sample's own and the batch's.

The Fisher step of one sample alone is ``g / |g|^2``: every sample moves, those with small gradients most. The isotropic
Fisher step of the batch is ``g / s``, ``s = mean |g|^2``: samples keep their weights, the batch becomes as large as a
Newton step's. The geometric mean of both curvatures,

.. math:: \text{step}_i = \frac{g_i}{\sqrt{|g_i|^2 + c\, s}\; \sqrt{s}},

weighs samples as soft normalisation does and sizes batches as the Newton step does. s is a running mean over batches.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import newton_plugin as npl

__all__ = ["GeometricMean"]


class GeometricMean(npl.Curvature):
    """``g_i / (sqrt(|g_i|^2 + c s) sqrt(s))``, s the running mean of ``mean |g|^2``.

    Args:
        c: how soft. decay: of the running mean; corrected for its start.
        growth: most that a batch may count for, against the mean before it.
        floor: s is at least this share of its slow running mean (decay .999).

    >>> g = torch.tensor([[3.0, 4.0], [0.6, 0.8]], dtype=torch.float64)
    >>> GeometricMean(c=1e-12).step(g, None, npl.AutoDamping()).step * 13**0.5  # s = (25 + 1) / 2
    tensor([[0.6000, 0.8000],
            [0.6000, 0.8000]], dtype=torch.float64)
    """

    def __init__(self, c: float = 0.1, decay: float = 0.9, growth: float = 10.0, floor: float = 1e-3) -> None:
        self.c, self.decay, self.growth, self.floor = c, decay, growth, floor
        self._means: dict[str, tuple[Tensor, Tensor]] = {}

    def _mean(self, name: str, value: Tensor, decay: float, growth: float) -> Tensor:
        total, weight = self._means.get(name, (torch.zeros_like(value), torch.zeros_like(value)))
        finite = torch.isfinite(value)
        known = total / weight.clamp_min(torch.finfo(value.dtype).tiny)
        value = torch.where((known > 0) & (value > growth * known), growth * known, value)
        total = torch.where(finite, decay * total + (1 - decay) * value, total)
        weight = torch.where(finite, decay * weight + (1 - decay), weight)
        self._means[name] = total, weight
        return total / weight.clamp_min(torch.finfo(value.dtype).tiny)

    def step(self, gradient: Tensor, hvp: Any, damping: npl.Damping) -> npl.CurvatureStep:
        """See :meth:`newton_plugin.Curvature.step`; neither Hessian nor damping is used."""
        squared = gradient.square().sum(-1, keepdim=True)
        now = squared.mean()
        s = self._mean("s", now, self.decay, self.growth)
        s = torch.maximum(s, self.floor * self._mean("slow", s, 0.999, math.inf))
        s = s.clamp_min(torch.finfo(s.dtype).tiny)
        d = self.c * s
        step = gradient / ((squared + d).sqrt() * s.sqrt())
        return npl.CurvatureStep(
            step,
            d,
            extremes=lambda: (torch.zeros_like(s), squared.max()),
            finiteness=npl.Finiteness(curvature=torch.isfinite(now)),
        )

    def state_dict(self) -> dict[str, Any]:
        """The running means."""
        return {"means": dict(self._means)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._means = dict(state["means"])
