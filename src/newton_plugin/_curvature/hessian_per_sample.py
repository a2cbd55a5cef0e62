"""A Hessian for each sample: formed and inverted one by one where that is cheap, in Krylov spaces where it is not."""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin._curvature.damping import Damping, Tikhonov, damping_for
from newton_plugin._curvature.protocol import CurvatureStep
from newton_plugin._curvature.running_mean import RunningMean
from newton_plugin._curvature.sizes import _SMALL_FEATURES, PER_SAMPLE_FEATURES
from newton_plugin._derivatives.hessian_sums import DirectForms, sample_hessians
from newton_plugin._linalg.damped_inverse import (
    eigenvalue_scale,
    finite_or_identity,
    repaired_inverse,
    spectral_inverse,
)
from newton_plugin._linalg.diagonal_rank_one import DiagonalRankOne, sample_squares, solve_samples
from newton_plugin._linalg.krylov import KrylovOptions, lockstep_power
from newton_plugin._linalg.matrices import Dense
from newton_plugin._linalg.sketch import random_signs
from newton_plugin._runtime.processes import Ranks

__all__ = ["per_sample_step", "probe_samples"]


def probe_samples(forms: DirectForms, gradient: Tensor, damping: Damping) -> Tensor:
    """All H_i (N, m, m) where they are few and small or known; else one product for each sample, (N, m).

    That is ``H_i g_i``, the first of those that the step takes; or, where the damping asks for the scale of H,
    ``H_i z_i`` for random signs z.
    """
    n, m = gradient.shape
    if forms.blocks is not None or m <= PER_SAMPLE_FEATURES:
        return sample_hessians(forms, gradient)
    if type(damping) is Tikhonov:
        return forms.products(gradient.unsqueeze(0))[0]
    return forms.products(random_signs((1, n, m), gradient))[0]


def per_sample_step(
    forms: DirectForms,
    probed: Tensor | None,
    gradient: Tensor,
    damping: Damping,
    power: float,
    krylov: KrylovOptions,
    mean: RunningMean,
    ranks: Ranks,
) -> CurvatureStep:
    """``(H_i + d I)^-power g_i`` for every sample; ``g_i g_i'`` in place of Hessians that are all zero.

    Args:
        forms: the Hessians.
        probed: what :func:`probe_samples` gave, if they are not known.
        gradient: (N, m).
        damping: relative to the running mean of the samples' mean scale ``||H_i||_F / sqrt(m)``.
        power: 1 or 0.5.
        krylov: when to stop.
        mean: of the scale.
        ranks: the processes that share the batch.
    """
    n, m = gradient.shape
    form = forms.diagonal_rank_one
    if form is not None and m <= _SMALL_FEATURES:
        form, probed = None, sample_hessians(forms, gradient)
    if form is None and probed is None:
        probed = sample_hessians(forms, gradient)
    if form is not None:
        scales = sample_squares(form, n, m).sqrt() / m**0.5
    elif probed is not None and probed.ndim == 3:
        scales = eigenvalue_scale(probed)
    else:  # E |H z|^2 = ||H||_F^2 for random signs z
        assert probed is not None
        scales = torch.linalg.vector_norm(probed, dim=-1) / m**0.5
    finite = torch.isfinite(scales).all()
    zero = ranks.all((scales == 0).all())
    squared = torch.linalg.vecdot(gradient, gradient)
    first = probed if type(damping) is Tikhonov and probed is not None and probed.ndim == 2 else None
    if first is not None:
        zero = zero & ~ranks.all((squared == 0).all())  # of no gradient, H says nothing
    scales = torch.where(zero, squared / m**0.5, scales)
    average = damping.averaging
    d = damping_for(damping, lambda: mean.update(ranks.mean(scales.sum(), n), average.decay, average.growth), gradient)
    if form is None and probed is not None and probed.ndim == 3:
        return _formed(probed, gradient, d, power, zero, finite)
    # Where all Hessians are zero: Fisher, (g g' + d I)^-p g.
    fisher = gradient * (squared.unsqueeze(-1) + d).pow(-power)
    if form is not None:
        solved, extremes = solve_samples(form, d, gradient, power), lambda: _extremes(form, gradient, d)
    else:
        taken = lockstep_power(lambda v: forms.products(v.unsqueeze(0))[0], gradient, d, power, krylov, first)
        solved, extremes = taken.step, lambda: taken.extremes
    return CurvatureStep(torch.where(zero, fisher, solved), d, None, extremes, zero_hessian=zero, finite=finite)


def _formed(c: Tensor, gradient: Tensor, d: Tensor, power: float, zero: Tensor, finite: Tensor) -> CurvatureStep:
    c = finite_or_identity(torch.where(zero, gradient.unsqueeze(-1) * gradient.unsqueeze(-2), c))
    inverse = repaired_inverse(c, d) if power == 1 else spectral_inverse(c, d, power)
    return CurvatureStep(inverse(gradient), d, c, lambda: Dense(c).extremes(), zero_hessian=zero, finite=finite)


def _extremes(form: DiagonalRankOne, gradient: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Exact for a diagonal; else as far as 48 products show, from a random start."""
    if form.weight is None:
        return form.diagonal.min(), form.diagonal.max()
    start = random_signs(tuple(gradient.shape), gradient)
    return lockstep_power(lambda v: form(v.unsqueeze(0))[0], start, d, 1.0, KrylovOptions(1e-10, 48)).extremes
