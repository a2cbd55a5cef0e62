"""How a loss behaves: called twice, in another dtype; its eigenvalues and its cost."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from newton_plugin.testing._reasons import first_line, in_plain_words
from newton_plugin.testing._report import Finding
from newton_plugin.testing._subject import Subject

__all__ = ["definiteness", "determinism", "hessian_cost", "precision"]

_REPEATS = 5


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest entry of ``theirs``, in float64; absolute where ``theirs`` is zero."""
    size = float(theirs.double().abs().max())
    difference = float((ours.double() - theirs.double()).abs().max())
    return difference / size if size > 0 else difference


def determinism(subject: Subject) -> Finding:
    """Whether the gradient is the same from the same seed, and from another seed."""
    first, again, other = (subject.gradient(seed=seed) for seed in (0, 0, 1))
    rounding = 1e3 * torch.finfo(first.dtype).eps
    if not relative(again, first) <= rounding:
        return Finding(
            "note",
            "unrepeatable",
            "a second call gave another gradient from the same seed of torch: other generators, or a state inside. "
            "Finite differences mean nothing then.",
            "take a generator, or draw from torch's own",
        )
    if not relative(other, first) <= rounding:
        return Finding(
            "note", "random", "it draws from torch's generator; one evaluation gives the plugin all it needs"
        )
    return Finding("ok", "deterministic")


def precision(native: Subject, curved: bool) -> Finding:
    """The gradient, and the Hessian if ``curved``, in float32 against float64 at the same outputs."""
    try:
        low = native.to(torch.float32)
        high = low.to(torch.float64)
        errors = {"gradient": relative(low.gradient(), high.gradient())}
        if curved:
            generator = torch.Generator().manual_seed(3)
            probes = torch.randn(2, *high.outputs.shape, generator=generator).to(low.outputs)
            ours = low.hessian_products(probes)
            errors["Hessian"] = relative(ours, high.hessian_products(probes.double()))
    except Exception as error:
        words, remedy = in_plain_words(error)
        return Finding("note", "one dtype only", f"not compared: {words}", remedy, first_line(error))
    words = ", ".join(f"{name} {error:.0e}" for name, error in errors.items()) + " (relative error)"
    worst = math.nan if any(math.isnan(e) for e in errors.values()) else max(errors.values())
    if worst <= 1e-4:
        return Finding("ok", "accurate", words, number=worst)
    remedy = "compute it in the log domain (logsigmoid, logsumexp, log1p, expm1), or in float64: outputs.double()"
    if worst <= 1e-2:
        return Finding("note", "inaccurate", words, remedy, number=worst)
    return Finding("fails", "wrong in float32", words, remedy, number=worst)


def definiteness(blocks: Tensor) -> Finding:
    """The signs of the eigenvalues of the samples' Hessians (N, m, m) and of their mean."""
    values = torch.linalg.eigvalsh((blocks + blocks.mT).double() / 2)
    mean = torch.linalg.eigvalsh((blocks + blocks.mT).double().mean(0) / 2)
    low, high = float(values.min()), float(values.max())
    zero = (1e-9 if blocks.dtype == torch.float64 else 1e-5) * max(abs(low), abs(high))
    words = f"eigenvalues from {low:.2g} to {high:.2g}"
    if low > zero:
        return Finding("ok", "positive definite", words, number=low)
    if low >= -zero:
        return Finding("ok", "positive semidefinite", words, number=low)
    verdict = "indefinite" if high > zero else "negative semidefinite"
    bad, of = int((values[:, 0] < -zero).sum()), len(values)
    average = f"the mean's from {float(mean[0]):.2g} to {float(mean[-1]):.2g}"
    return Finding(
        "note",
        verdict,
        f"{words}, negative ones in {bad} of {of} samples; {average}. Where C + damping I is not positive "
        "definite the plugin takes |eigenvalues|, so that no step goes uphill",
        number=low,
    )


def hessian_cost(subject: Subject, closed_form: bool) -> Finding:
    """The time of loss, gradient and Hessian over that of loss and gradient: interleaved medians on this machine."""
    times: dict[str, list[float]] = {"gradient": [], "both": []}
    for _ in range(_REPEATS):
        for name, run in (("gradient", subject.gradient), ("both", subject.blocks)):
            start = time.perf_counter()
            run()
            if subject.outputs.is_cuda:
                torch.cuda.synchronize(subject.outputs.device)
            times[name].append(time.perf_counter() - start)
    middle = {name: sorted(values)[_REPEATS // 2] for name, values in times.items()}
    ratio = middle["both"] / middle["gradient"]
    m = subject.layout.features
    words = f"{m} Hessian-vector products; all of it over the loss and its gradient alone"
    if closed_form:
        words += ". The plugin knows this loss's Hessian in closed form, and takes none"
    return Finding("ok", f"{ratio:.1f} gradients", words, number=ratio)
