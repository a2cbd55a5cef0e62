"""All candidates by name."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.evidence.rules.of_direction import Coherent, Rms, ShrunkFisher, ShrunkHessian, WhitenedSoftNorm
from benchmarks.evidence.rules.of_size import (
    Accepted,
    BatchNorm,
    GeometricMean,
    MeanPolyak,
    MedianClip,
    Polyak,
    SoftNorm,
)
from benchmarks.evidence.rules.rule import Rule

__all__ = ["RULES"]

RULES: dict[str, Callable[[], Rule]] = {
    "soft norm, c = .01": lambda: SoftNorm(0.01),
    "soft norm, c = 1": lambda: SoftNorm(1.0),
    "soft norm, c = .1, running": lambda: SoftNorm(0.1, decay=0.9),
    "soft norm, c = 1, running": lambda: SoftNorm(1.0, decay=0.9),
    "soft norm, c = 3, running": lambda: SoftNorm(3.0, decay=0.9),
    "soft norm, c = 10, running": lambda: SoftNorm(10.0, decay=0.9),
    "per sample, p = .25": lambda: SoftNorm(0.1, 0.25),
    "per sample, p = 1, running": lambda: SoftNorm(1.0, 1.0, 0.9),
    "batch size, p = .5": lambda: BatchNorm(0.5),
    "batch size, p = 1": lambda: BatchNorm(1.0),
    "soft norm x 1/|g|, c = .01": lambda: GeometricMean(0.01),
    "soft norm x 1/|g|, c = .1": lambda: GeometricMean(0.1),
    "soft norm x 1/|g|, c = .1, decay .99": lambda: GeometricMean(0.1, decay=0.99),
    "soft norm x 1/|g|, c = 1": lambda: GeometricMean(1.0),
    "soft norm x 1/|g|, c = 10": lambda: GeometricMean(10.0),
    "soft norm x 1/|g|^2, c = .1": lambda: GeometricMean(0.1, 1.0),
    "soft norm x 1/|g|^.5, c = 1": lambda: GeometricMean(1.0, 0.25),
    "soft norm, whitened": lambda: WhitenedSoftNorm(0.1),
    "Fisher shrunk, a = .5": lambda: ShrunkFisher(0.5),
    "Fisher shrunk, a = .1": lambda: ShrunkFisher(0.1),
    "Fisher power .5": lambda: ShrunkFisher(1.0, power=0.5),
    "diagonal": lambda: Rms(),
    "clipped at the median": lambda: MedianClip(),
    "Polyak": lambda: Polyak(),
    "Polyak, c = 1": lambda: Polyak(1.0),
    "Polyak of the batch": lambda: MeanPolyak(),
    "soft norm, accepted": lambda: Accepted(SoftNorm()),
    "batch size, p = 1, accepted": lambda: Accepted(BatchNorm(1.0)),
    "Hessian shrunk, a = .5": lambda: ShrunkHessian(0.5),
    "Hessian shrunk, a = .5, power .5": lambda: ShrunkHessian(0.5, power=0.5),
    "whitening damped by noise": lambda: Coherent(),
}
