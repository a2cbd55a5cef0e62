"""How far each sample of a batch contradicts the body of the batches before it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DECAYS", "Contradiction"]

DECAYS = (0.9, 0.98)
"""Of the running mean of the body's gradient."""
_METRIC_DECAY, _SIZE_DECAY, _FLOOR = 0.99, 0.9, 1e-3


class _Mean:
    """A running mean; the first one is the value itself."""

    def __init__(self, decay: float) -> None:
        self.decay, self._total, self._weight = decay, torch.zeros(()), 0.0

    def update(self, value: Tensor) -> Tensor:
        self._total = self.decay * self._total + (1 - self.decay) * value
        self._weight = self.decay * self._weight + 1 - self.decay
        return self.value

    @property
    def value(self) -> Tensor:
        return self._total / self._weight


class Contradiction:
    """The contradiction of samples, for R replicas at once; see the package's docstring for the formulas.

    The running means are the gate's without its bounds against single huge batches: these losses have bounded
    gradients.
    """

    def __init__(self) -> None:
        self._size, self._metric = _Mean(_SIZE_DECAY), _Mean(_METRIC_DECAY)
        self._bodies = {decay: _Mean(decay) for decay in DECAYS}
        self._seen = False

    def __call__(self, gradient: Tensor, head: Tensor) -> dict[str, Tensor]:
        """Take in a batch.

        Args:
            gradient: (R, N, m), of the samples' losses at the outputs.
            head: (R, N, D), at the last layer's weights.

        Returns:
            ``cosine``, ``inner`` and ``rank`` by decay, each (R, N); NaN for the first batch, which nothing precedes.
        """
        gradient, head = gradient.double(), head.double()
        tiny = torch.finfo(torch.float64).tiny
        squared = gradient.square().sum(-1, keepdim=True)
        s = self._size.update(squared.mean(1, keepdim=True)) + tiny
        v = head / s.sqrt()
        found: dict[str, Tensor] = {}
        if self._seen:
            q = self._metric.value
            d = (q + _FLOOR * q.mean(-1, keepdim=True) + tiny).rsqrt()
            length = (v.square() * d).sum(-1).sqrt()
            for decay, body in self._bodies.items():
                u = body.value
                inner = -(v * d * u).sum(-1)
                cosine = inner / (length * (u.square() * d).sum(-1).sqrt() + tiny)
                rank = cosine.argsort(-1).argsort(-1).double() / max(1, cosine.shape[-1] - 1)
                found |= {f"cosine {decay:g}": cosine, f"inner {decay:g}": inner, f"rank {decay:g}": rank}
        else:
            nothing = torch.full(gradient.shape[:2], torch.nan, dtype=torch.float64)
            found = {f"{kind} {decay:g}": nothing for kind in ("cosine", "inner", "rank") for decay in DECAYS}
            self._seen = True
        self._metric.update(v.mean(1, keepdim=True).square())
        in_body = (squared <= s).double()
        for body in self._bodies.values():
            body.update((in_body * v).mean(1, keepdim=True))
        return found
