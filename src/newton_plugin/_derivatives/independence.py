"""Does a loss couple the samples of its batch? One probe with random signs tells."""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin._derivatives.sample_hessians import HVP
from newton_plugin._errors import BatchCoupledError

__all__ = ["COUPLED", "samples_are_independent"]

COUPLED = "the loss couples the samples of a batch, so per-sample Hessians do not exist"


def samples_are_independent(hvp: HVP, gradient: Tensor) -> bool:
    """True if H is block diagonal over samples; raise if it is not; False if that cannot be told yet.

    For independent samples ``H (s * u) = s * (H u)`` for any sign s_i per sample; where sample i's gradient
    depends on sample j's output the two differ (with probability one over u).

    Raises:
        BatchCoupledError: the loss couples samples.
    """
    n, m = gradient.shape
    if n < 2:
        return False
    # A separate generator: the user's random state stays as it is.
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(n, m, generator=generator, dtype=torch.float64).to(gradient)
    signs = (torch.arange(n) % 2 * 2.0 - 1)[torch.randperm(n, generator=generator)].to(gradient).unsqueeze(1)
    together, signed = hvp(torch.stack([u, signs * u]))
    error, size = (signed - signs * together).norm(), together.norm()
    if not bool(torch.isfinite(error)) or not bool(size > 0):
        return False
    if bool(error > 1e-3 * size):
        raise BatchCoupledError(
            f"{COUPLED} (a Hessian-vector product with random signs per sample "
            f"differs by {float(error / size):.1e} relative). "
            "Use curvature='fisher' or 'norm', or 'auto', which chooses Fisher here. If each sample is "
            "several rows of the outputs, name the feature dimensions by feature_dims."
        )
    return True
