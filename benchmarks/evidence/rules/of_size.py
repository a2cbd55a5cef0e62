"""Candidates that keep the direction of every gradient and change its length: per sample, or per batch."""

from __future__ import annotations

import torch
from benchmarks.evidence.rules.rule import TINY, Batch, Rule
from torch import Tensor

__all__ = ["Accepted", "BatchNorm", "GeometricMean", "MeanPolyak", "MedianClip", "Polyak", "SoftNorm"]


class SoftNorm(Rule):
    """``g_i / (|g_i|^2 + c s)^p``: p = .5 is soft normalisation, p = 1 a per-sample Newton step.

    Args:
        c: how soft. p: the power. decay: of the running mean of s; 0: this batch's.
    """

    def __init__(self, c: float = 0.1, p: float = 0.5, decay: float = 0.0) -> None:
        super().__init__()
        self.c, self.p, self.decay = c, p, decay

    def step(self, batch: Batch) -> Tensor:
        squared = batch.squared()
        s = self.running("s", squared.mean(1, keepdim=True), self.decay)
        return batch.gradient * (squared + self.c * s + TINY).pow(-self.p)


class BatchNorm(Rule):
    """``g_i / s^p``: only the size of a whole batch changes, no direction and no sample's weight.

    Args:
        p: the power. decay: of the running mean of s.
    """

    def __init__(self, p: float, decay: float = 0.9) -> None:
        super().__init__()
        self.p, self.decay = p, decay

    def step(self, batch: Batch) -> Tensor:
        s = self.running("s", batch.squared().mean(1, keepdim=True), self.decay)
        return batch.gradient * (s + TINY).pow(-self.p)


class GeometricMean(Rule):
    """``g_i / (sqrt(|g_i|^2 + c s) s^q)``, s averaged: soft normalisation, then the batch as large as a Newton step's.

    For q = .5 the divisor is the geometric mean of two curvatures, the sample's own, ``|g_i|^2 + c s``, and the
    batch's, s: as the Fisher step it scales like 1/g, but no sample has more than a share of it.

    Args:
        c: of soft normalisation. q: the power of the batch's size. decay: of the running mean of s, which is never
            below .001 of its running mean with decay .999.
    """

    def __init__(self, c: float, q: float = 0.5, decay: float = 0.9) -> None:
        super().__init__()
        self.c, self.q, self.decay = c, q, decay

    def step(self, batch: Batch) -> Tensor:
        squared = batch.squared()
        now = squared.mean(1, keepdim=True)
        s = torch.maximum(self.running("s", now, self.decay), 1e-3 * self.running("slow", now, 0.999))
        return batch.gradient * (squared + self.c * s + TINY).rsqrt() * (s + TINY).pow(-self.q)


class MedianClip(Rule):
    """``g_i min(1, q / |g_i|)``, q a quantile of the batch's norms: only samples that stand out change."""

    def __init__(self, quantile: float = 0.5) -> None:
        super().__init__()
        self.quantile = quantile

    def step(self, batch: Batch) -> Tensor:
        norm = batch.squared().sqrt()
        q = torch.quantile(norm, self.quantile, dim=1, keepdim=True)
        return batch.gradient * (q / norm.clamp_min(TINY)).clamp(max=1.0)


class Polyak(Rule):
    """``g_i l_i / (|g_i|^2 + c s)``: Polyak's step length, for losses whose least value is zero."""

    def __init__(self, c: float = 0.1) -> None:
        super().__init__()
        self.c = c

    def step(self, batch: Batch) -> Tensor:
        squared = batch.squared()
        s = self.running("s", squared.mean(1, keepdim=True))
        return batch.gradient * batch.loss.unsqueeze(-1) / (squared + self.c * s + TINY)


class MeanPolyak(Rule):
    """``g_i mean l / s``, both averaged: Polyak's step length of the whole batch."""

    def step(self, batch: Batch) -> Tensor:
        s = self.running("s", batch.squared().mean(1, keepdim=True))
        return batch.gradient * self.running("l", batch.loss.mean(1)[:, None, None]) / (s + TINY)


class Accepted(Rule):
    """A rule whose step is halved, for each sample, while it does not lower that sample's loss (at most twice).

    Scaled first so that a typical step is ``length`` times the spread of the outputs.
    """

    def __init__(self, inner: Rule, length: float = 0.3) -> None:
        super().__init__()
        self.inner, self.length = inner, length

    def step(self, batch: Batch) -> Tensor:
        step = self.inner.step(batch)
        y = batch.outputs
        spread = (y - y.mean(-1, keepdim=True)).square().mean((1, 2), keepdim=True).sqrt()
        size = step.square().mean((1, 2), keepdim=True).sqrt()
        unit = self.length * spread / (size + TINY)
        for _ in range(2):
            worse = batch.evaluate(y - unit * step) >= batch.loss
            step = torch.where(worse.unsqueeze(-1), step / 2, step)
        return step
