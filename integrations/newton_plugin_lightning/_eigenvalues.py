"""Eigenvalues on the host, for people."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["eigenvalues"]


def eigenvalues(matrix: Tensor) -> Tensor:
    """Of symmetric matrices (..., k, k), ascending, (..., k), on the host. Waits for the device.

    All NaN, if one number is not finite.
    """
    on_host = matrix.detach().cpu()
    if not bool(torch.isfinite(on_host).all()):
        return on_host.new_full(on_host.shape[:-1], torch.nan)
    return torch.linalg.eigvalsh(on_host)
