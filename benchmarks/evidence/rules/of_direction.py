"""Candidates that change the direction of gradients: by a matrix, or by its diagonal."""

from __future__ import annotations

import torch
from benchmarks.evidence.rules.of_size import SoftNorm
from benchmarks.evidence.rules.rule import TINY, Batch, Rule
from torch import Tensor

__all__ = ["Coherent", "Rms", "ShrunkFisher", "ShrunkHessian", "WhitenedSoftNorm"]


class ShrunkFisher(Rule):
    """``(a C + (1 - a) g_i g_i' + d I)^-1 g_i`` with the running mean C: per-sample curvature, shrunk to the mean.

    Args:
        a: share of the mean. ratio: d over the root-mean-square eigenvalue of C.
    """

    def __init__(self, a: float, ratio: float = 0.3, power: float = 1.0) -> None:
        super().__init__()
        self.a, self.ratio, self.power = a, ratio, power

    def step(self, batch: Batch) -> Tensor:
        g = batch.gradient
        c = self.running("c", g.mT @ g / g.shape[1])
        values, vectors = torch.linalg.eigh(c)
        size = values.square().mean(-1, keepdim=True).sqrt()
        size = torch.maximum(size, 1e-3 * self.running("slow", size, 0.999))
        scaled = (self.a * values.clamp_min(0) + self.ratio * size + TINY).pow(-self.power)
        step = (g @ vectors * scaled.unsqueeze(1)) @ vectors.mT
        return step / (1 + (1 - self.a) * (g * step).sum(-1, keepdim=True))  # Sherman and Morrison


class Rms(Rule):
    """``g_ij / sqrt(v_j + c mean v)``, v the running mean of g_ij^2: Adam's denominator, at the outputs."""

    def __init__(self, c: float = 0.1) -> None:
        super().__init__()
        self.c = c

    def step(self, batch: Batch) -> Tensor:
        v = self.running("v", batch.gradient.square().mean(1, keepdim=True))
        return batch.gradient / (v + self.c * v.mean(-1, keepdim=True) + TINY).sqrt()


class WhitenedSoftNorm(Rule):
    """``(C + .3 |C| I)^-1/2 g_i / sqrt(|g_i|^2 + c s)``: the geometric mean, with the directions of the batch."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.inner, self.soft = ShrunkFisher(1.0, power=0.5), SoftNorm(c, decay=0.9)

    def step(self, batch: Batch) -> Tensor:
        share = self.soft.step(batch).square().sum(-1, keepdim=True) / (batch.squared() + TINY)
        return self.inner.step(batch) * share.sqrt()


class ShrunkHessian(Rule):
    """``(a mean H + (1 - a) H_i)^2 + ...``: per-sample Hessians shrunk to their running mean, |eigenvalues| + d.

    Args:
        a: share of the mean. ratio: d over the running root-mean-square eigenvalue.
    """

    needs_hessian = True

    def __init__(self, a: float, ratio: float = 0.3, power: float = 1.0) -> None:
        super().__init__()
        self.a, self.ratio, self.power = a, ratio, power

    def step(self, batch: Batch) -> Tensor:
        h = batch.hessian()
        mean = self.running("h", h.mean(1))
        values, vectors = torch.linalg.eigh(self.a * mean.unsqueeze(1) + (1 - self.a) * h)
        size = values.square().mean((1, 2), keepdim=True).sqrt()
        size = self.running("size", size)
        scaled = (values.abs() + self.ratio * size + TINY).pow(-self.power)
        rotated = (vectors.mT @ batch.gradient.unsqueeze(-1)).squeeze(-1) * scaled
        return (vectors @ rotated.unsqueeze(-1)).squeeze(-1)


class Coherent(Rule):
    """Whitening damped by noise: along each eigenvector of C the step is ``g (signal / total) / sqrt(total)``.

    total: the eigenvalue of C, the second moment of g. signal: the part that two halves of the batch share, the
    second moment of the difference of their means taken from that of their sum. Where samples only disagree, less.
    """

    def __init__(self, ratio: float = 0.3) -> None:
        super().__init__()
        self.ratio = ratio

    def step(self, batch: Batch) -> Tensor:
        g = batch.gradient
        n = g.shape[1]
        c = self.running("c", g.mT @ g / n, 0.99)
        mean = g.mean(1, keepdim=True)
        outer = self.running("mean", mean.mT @ mean, 0.99)
        values, vectors = torch.linalg.eigh(c)
        power = (vectors.mT @ outer @ vectors).diagonal(dim1=-2, dim2=-1)  # of the batch mean: signal + total / n
        size = values.mean(-1, keepdim=True)
        signal = (power - values.clamp_min(0) / n).clamp_min(0) + self.ratio * size / n
        weight = signal / (signal + values.clamp_min(0) / n + TINY)
        scaled = weight / (values.clamp_min(0) + self.ratio * size + TINY).sqrt()
        return (g @ vectors * scaled.unsqueeze(1)) @ vectors.mT
