"""Does a loss couple the samples of its batch? One probe with random signs tells."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from newton_plugin._derivatives.sample_hessians import HVP
from newton_plugin._errors import BatchCoupledError
from newton_plugin._runtime.transforms import outside_transforms

__all__ = ["COUPLED", "MOST", "coupling", "samples_are_independent"]

COUPLED = "the loss couples the samples of a batch, so per-sample Hessians do not exist"

MOST = 1e-3  # most that a :func:`coupling` may be: rounding of single precision, many operations long


def coupling(hvp: HVP, gradient: Tensor) -> Tensor:
    """How far H is from block diagonal over samples, against its size; no dimensions. NaN where that cannot be told.

    For independent samples ``H (s * u) = s * (H u)`` for any sign s_i per sample; where sample i's gradient
    depends on sample j's output the two differ (with probability one over u).
    """
    n, m = gradient.shape
    with outside_transforms():
        # A separate generator: the user's random state stays as it is.
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(n, m, generator=generator, dtype=torch.float64)
        signs = (torch.arange(n) % 2 * 2.0 - 1)[torch.randperm(n, generator=generator)]
    u, signs = u.to(gradient), signs.to(gradient).unsqueeze(1)
    together, signed = hvp(torch.stack([u, signs * u]))
    return (signed - signs * together).norm() / together.norm()


def samples_are_independent(hvp: HVP, gradient: Tensor) -> bool:
    """True if H is block diagonal over samples; raise if it is not; False if that cannot be told yet.

    Raises:
        BatchCoupledError: the loss couples samples.
    """
    if len(gradient) < 2:
        return False
    found = float(coupling(hvp, gradient))
    if not math.isfinite(found):
        return False
    if found > MOST:
        raise BatchCoupledError(
            f"{COUPLED} (a Hessian-vector product with random signs per sample differs by {found:.1e} relative). "
            "Use curvature='fisher' or 'norm', or 'auto', which chooses Fisher here. If each sample is "
            "several rows of the outputs, name the feature dimensions by feature_dims."
        )
    return True
