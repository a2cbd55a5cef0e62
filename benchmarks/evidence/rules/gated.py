r"""The dense twin of ``npl.GatedFisher``, for all replicas at once.

Every sample's gradient at the last layer's weights is formed, ``v_i``; the package never does that. The formulas stand
in the package, at ``GatedFisher`` and ``GradientConflict``; the two are the same step (``test_evidence_gated.py``). The
controls that the package does not have are here: an inverted gate, and groups drawn at random.
"""

from __future__ import annotations

from typing import Literal

import torch
from benchmarks.evidence.rules.rule import TINY, Batch, Rule
from torch import Tensor

__all__ = ["Gate", "Gated", "Size"]

Gate = Literal["conflict", "inverted", "random"] | float
Size = Literal["plain", "norm", "newton", "signal"]
_DECAY, _SIGNAL_DECAY, _METRIC_DECAY, _WAIT, _BATCHES, _CAP = 0.98, 0.998, 0.99, 10, 20, 9.0


class Gated(Rule):
    """``w_i g_i z / sqrt(max(b, b_now / 9))``, the first twenty steps as long as their gradients.

    Args:
        gate: "conflict": p from the contradiction; "inverted": 1 - p; "random": groups drawn at random in place of body
            and tail; a number: that p.
        size: z, see ``GatedFisher``.
        most: no sample counts for more than that many times ``mean |g|^2``, but for what the bound is lifted by.
        lifts: whether it is ever lifted.

    Attributes:
        opened: p of the last step, (R, 1, 1).
        share: the signal's share of a batch's gradient then, (R, 1, 1).
        lifted: how far the bound was lifted, (R, 1, 1).
    """

    needs_head = True

    def __init__(self, gate: Gate = "conflict", size: Size = "signal", most: float = 2.0, lifts: bool = True) -> None:
        super().__init__()
        self.gate, self.size, self.most, self.lifts = gate, size, most, lifts
        self.opened = self.share = self.lifted = torch.zeros(1, 1, 1)
        self._generator = torch.Generator().manual_seed(0)
        self._q: Tensor | None = None
        self._log: Tensor | None = None
        self._last: Tensor | None = None
        self._lengths: list[Tensor] = []
        self._steps = 0

    def step(self, batch: Batch) -> Tensor:
        squared = batch.squared()
        now = squared.mean(1, keepdim=True)
        mean = self.running("s", now, bounded=True)
        s = torch.maximum(mean, 1e-3 * self.running("slow", mean, 0.999)) + TINY
        x = squared / s
        self._read(s)
        self._take_in(batch, x, s)  # for the next batch
        p, bound = self.opened, (self.most / (x + TINY)).sqrt().clamp_max(1.0)
        weights = (1 - p + p * 1.3 / (1.3 + x)) * (bound + self.lifted * (1 - bound))
        weighted = (weights.square() * squared).mean(1, keepdim=True)
        b = self.running("b", weighted, bounded=True)
        bound = b if self.size == "plain" else torch.maximum(b, weighted / _CAP)
        step = weights * batch.gradient * self._z(s) / (bound + (s - mean).clamp_min(0) + TINY).sqrt()
        if len(self._lengths) < _BATCHES:
            ratio = now / step.square().sum(-1, keepdim=True).mean(1, keepdim=True)
            self._lengths.append(ratio.nan_to_num(1.0, 1.0, 1.0).clamp_min(TINY).log() / 2)
        return step * torch.stack(self._lengths).mean(0).exp()

    def running(self, name: str, value: Tensor, decay: float = 0.9, bounded: bool = False) -> Tensor:
        """With a bound: one value counts for at most ten times the mean before it."""
        if bounded and name in self._totals:
            total, weight = self._totals[name]
            size, limit = (t.norm(dim=-1, keepdim=True) for t in (value, 10 * total / weight))
            value = value / (size / limit).nan_to_num(1.0, 1.0).clamp_min(1.0)
        return super().running(name, value, decay)

    def _z(self, s: Tensor) -> Tensor:
        if self.size in ("plain", "newton"):
            return s.sqrt() if self.size == "plain" else s.rsqrt()
        log = s.log()
        if self._log is None or self._last is None:
            self._log, self._last = torch.zeros_like(log), log
        self._log = self._log + (1 - 2 * self.share).clamp(0, 0.5) * (log - self._last)
        self._last = log
        return self._log.exp() if self.size == "signal" else torch.ones_like(s)

    def _read(self, s: Tensor) -> None:
        """What the batches before this one say: all three attributes."""
        t, r, zero = self._steps, _DECAY, torch.zeros_like(s)
        self.opened, self.share, self.lifted = self._gated(zero), torch.full_like(s, 0.5), zero
        if not t:
            return
        c, squared, signal, noise, whole, total = (self._mean_of(n) for n in ("c", "cc", "S", "Q", "signal", "total"))
        effective = ((1 - r**t) / (1 - r)) ** 2 / ((1 - r ** (2 * t)) / (1 - r**2))
        error = ((squared - c.square()).clamp_min(0) / effective).sqrt()
        lengths = signal.clamp_min(0) + noise.clamp_min(0) / 10
        kappa = (-c - 2 * error).clamp_min(0) / (lengths.prod(-1, keepdim=True).sqrt() + TINY)
        p = (2 * kappa).clamp_max(1.0) if t > _WAIT else torch.zeros_like(kappa)
        tail = signal[..., 1:].clamp_min(0) / (signal.clamp_min(0).sum(-1, keepdim=True) + TINY)
        if self.lifts and t > _WAIT:
            self.lifted = ((4 * tail - 3).clamp_min(0) * (1 - p)).unsqueeze(-1)
        self.opened = self._gated(p.unsqueeze(-1))
        self.share = (whole / (total + TINY)).clamp(0, 1).unsqueeze(-1)

    def _take_in(self, batch: Batch, x: Tensor, s: Tensor) -> None:
        v = batch.head() / s.sqrt()  # (R, N, D)
        n = v.shape[1]
        body = (x <= 1).to(v.dtype)
        if self.gate == "random":
            drawn = torch.rand(1, n, 1, generator=self._generator, dtype=x.dtype)  # as a replica alone would draw
            body = (drawn < body.mean(1, keepdim=True)).to(v)
        groups = torch.cat([body, 1 - body], -1).mT  # (R, 2, N)
        u = groups @ v / n
        q, self._q = self._q, self.running("q", u.sum(1, keepdim=True).square(), _METRIC_DECAY, bounded=True)
        if q is None:  # the first batch counts for nothing
            return
        self._steps += 1
        d = (q + 1e-3 * q.mean(-1, keepdim=True) + TINY).rsqrt()
        norms, c = (u.square() * d).sum(-1), (u[:, :1] * u[:, 1:] * d).sum(-1)
        own = (groups @ (v.square() * d).sum(-1, keepdim=True)).squeeze(-1) / n**2
        signal = (norms - own) * n / (n - 1)
        for name, value in (("c", c), ("cc", c.square()), ("S", signal), ("Q", norms - signal)):
            self.running(name, value, _DECAY)
        total = norms.sum(-1, keepdim=True) + 2 * c
        self.running("signal", (total - own.sum(-1, keepdim=True)) * n / (n - 1), _SIGNAL_DECAY)
        self.running("total", total, _SIGNAL_DECAY)

    def _mean_of(self, name: str) -> Tensor:
        total, weight = self._totals[name]
        return total / weight

    def _gated(self, p: Tensor) -> Tensor:
        if self.gate == "inverted":
            return 1 - p
        return torch.full_like(p, self.gate) if isinstance(self.gate, float) else p
