"""A Hessian for each sample: formed and inverted one by one where that is cheap, in Krylov spaces where it is not."""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin._curvature.batch import Batch
from newton_plugin._curvature.damping import Damping, damping_for
from newton_plugin._curvature.finiteness import Finiteness
from newton_plugin._curvature.protocol import CurvatureStep
from newton_plugin._curvature.running_mean import RunningMean
from newton_plugin._curvature.sizes import PER_SAMPLE_FEATURES, SHOWN_FEATURES
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._linalg.damped_inverse import (
    eigenvalue_scale,
    finite_or_identity,
    repaired_inverse,
    spectral_inverse,
)
from newton_plugin._linalg.krylov import KrylovOptions, lockstep_power
from newton_plugin._linalg.matrices import Dense
from newton_plugin._linalg.sketch import random_signs

__all__ = ["per_sample_step", "probe_samples"]


def probe_samples(hessians: SampleHessians, gradient: Tensor, damping: Damping) -> Tensor:
    """All H_i (N, m, m) where they are known or small; else one product for each sample, (N, m).

    That product is ``H_i g_i``, the first one that the step needs; or ``H_i z_i`` for random signs z, where the damping
    asks for the scale of H.
    """
    n, m = gradient.shape
    if hessians.blocks is not None or m <= PER_SAMPLE_FEATURES:
        return hessians.dense(gradient)
    return hessians.of_one(random_signs((1, n, m), gradient)[0] if damping.needs_scale else gradient)


def per_sample_step(
    hessians: SampleHessians,
    probed: Tensor | None,
    batch: Batch,
    power: float,
    krylov: KrylovOptions,
    mean: RunningMean,
) -> CurvatureStep:
    """``(H_i + d I)^-power g_i`` for every sample; ``g_i g_i'`` in place of Hessians that are all zero.

    Args:
        hessians: of the samples of this process.
        probed: what :func:`probe_samples` gave, if they are not known.
        batch: the gradients; its damping is relative to the running mean of the samples' mean scale
            ``||H_i||_F / sqrt(m)``.
        power: 1 or 0.5.
        krylov: when to stop.
        mean: the running mean of the scale.
    """
    gradient, damping, ranks = batch.gradient, batch.damping, batch.ranks
    m = gradient.shape[1]
    rank_one = hessians.diagonal_rank_one if m > SHOWN_FEATURES else None
    if rank_one is not None:
        dense = product = None
        scales = rank_one.squared_norms().sqrt() / m**0.5
    elif probed is None or probed.ndim == 3:
        dense, product = hessians.dense(gradient) if probed is None else probed, None
        scales = eigenvalue_scale(dense)
    else:
        dense, product = None, probed  # H_i z_i: E |H z|^2 = ||H||_F^2 for random signs z
        scales = torch.linalg.vector_norm(product, dim=-1) / m**0.5
    finite = torch.isfinite(scales).all()
    zero = ranks.all((scales == 0).all())
    squared = torch.linalg.vecdot(gradient, gradient)
    first = None if damping.needs_scale else product
    if first is not None:  # H_i g_i, which is zero where g_i is, whatever H_i
        zero = zero & ~ranks.all((squared == 0).all())
    scales = torch.where(zero, squared / m**0.5, scales)
    d = damping_for(damping, lambda: batch.averaged(mean, ranks.mean(scales.sum(), batch.samples)), gradient)
    if dense is not None:
        return _formed(dense, gradient, d, power, zero, finite)
    # Where all Hessians are zero: Fisher, (g g' + d I)^-p g.
    fisher = gradient * (squared.unsqueeze(-1) + d).pow(-power)
    if rank_one is not None:
        solved, extremes = rank_one.inverse_times(gradient, d, power), lambda: rank_one.extremes(d)
    else:
        taken = lockstep_power(hessians.of_one, gradient, d, power, krylov, first)
        solved, extremes = taken.step, lambda: taken.extremes
    step = torch.where(zero, fisher, solved)
    return CurvatureStep(step, d, None, extremes, zero_hessian=zero, finiteness=Finiteness(finite))


def _formed(c: Tensor, gradient: Tensor, d: Tensor, power: float, zero: Tensor, finite: Tensor) -> CurvatureStep:
    c = finite_or_identity(torch.where(zero, gradient.unsqueeze(-1) * gradient.unsqueeze(-2), c))
    inverse = repaired_inverse(c, d) if power == 1 else spectral_inverse(c, d, power)
    extremes = Dense(c).extremes
    return CurvatureStep(inverse(gradient), d, c, extremes, zero_hessian=zero, finiteness=Finiteness(finite))
