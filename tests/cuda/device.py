"""The device of these tests. Where there is none, a test file that imports this module is skipped."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

_NAME = os.environ.get("NEWTON_PLUGIN_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
if not _NAME:
    pytest.skip("no CUDA device (NEWTON_PLUGIN_TEST_DEVICE=cpu runs the room without one)", allow_module_level=True)

CPU = torch.device("cpu")
DEVICE = torch.empty(0, device=_NAME).device  # with its index, as tensors have it
cuda_alone = pytest.mark.skipif(DEVICE.type != "cuda", reason="of CUDA devices alone")


def there(tensor: Tensor) -> Tensor:
    """A copy on the device, a leaf that requires grad where ``tensor`` does."""
    return tensor.detach().to(DEVICE, copy=True).requires_grad_(tensor.requires_grad)


def error(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest entry, of tensors on any devices; infinite for what is not finite."""
    ours, theirs = ours.detach().cpu().double(), theirs.detach().cpu().double()
    assert ours.shape == theirs.shape
    found = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-300))
    return found if found == found else float("inf")
