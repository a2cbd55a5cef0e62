"""Does a loss couple the samples of its batch? One probe with random signs tells."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from newton_plugin._derivatives.sample_hessians import HVP
from newton_plugin._errors import BatchCoupledError
from newton_plugin._runtime.transforms import outside_transforms

__all__ = ["MOST", "coupling", "samples_are_independent"]

MOST = 1e-3  # most that a :func:`coupling` may be: rounding of single precision, many operations long


def coupling(hvp: HVP, gradient: Tensor) -> Tensor:
    """How far H is from block diagonal over samples, against its size; no dimensions. NaN where that cannot be told.

    For independent samples ``H (s * u) = s * (H u)`` for any sign s_i per sample; where sample i's gradient
    depends on sample j's output the two differ (with probability one over u).
    """
    u, signs = _compiled_probes(gradient) if torch.compiler.is_compiling() else _probes(gradient)
    together, signed = hvp(torch.stack([u, signs * u]))
    return (signed - signs * together).norm() / together.norm()


def _probes(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """u, (N, m), and signs, (N, 1), as many of the one as of the other."""
    n, m = gradient.shape
    with outside_transforms():
        # A separate generator: the user's random state stays as it is.
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(n, m, generator=generator, dtype=torch.float64)
        signs = (torch.arange(n) % 2 * 2.0 - 1)[torch.randperm(n, generator=generator)]
    return u.to(gradient), signs.to(gradient).unsqueeze(1)


def _compiled_probes(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The same in arithmetic: torch.compile follows no generator."""
    n, m = gradient.shape

    def mixed(count: int, by: float) -> Tensor:
        k = torch.arange(count, dtype=torch.float64, device=gradient.device) + 1
        return (torch.sin(k * by) * 43758.5453).frac()

    i = torch.arange(n, device=gradient.device)
    signs = torch.where(mixed(n, 78.233) > 0, 1.0, -1.0)
    signs = torch.where(i == 0, -signs[1], signs)  # never one sign for all, of at least two
    return mixed(n * m, 12.9898).reshape(n, m).to(gradient), signs.to(gradient).unsqueeze(1)


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
            "the loss couples the samples of a batch, so per-sample Hessians do not exist (a Hessian-vector product "
            f"with random signs per sample differs by {found:.1e} relative). Use curvature='fisher' or 'norm'. If each "
            "sample is several rows of the outputs, name the feature dimensions by feature_dims."
        )
    return True
