"""Results as plain data: what ``torch.load(weights_only=True)`` reads back."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["DIGEST", "plain"]

DIGEST = "digest of a large tensor"
_KEPT_WHOLE = 4096  # elements; of a larger tensor about as many are kept, its norm, and a hash of all of them


def plain(value: Any) -> Any:
    """Tensors, numbers, texts, lists and dictionaries of these; any other object becomes its ``repr``.

    A large tensor becomes a dictionary with its shape, its norm, every k-th element and a hash of its bytes.
    """
    if isinstance(value, Tensor):
        value = value.detach()
        return _digest(value) if value.numel() > _KEPT_WHOLE else value.clone()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return repr(value)


def _digest(tensor: Tensor) -> dict[str, Any]:
    flat = tensor.reshape(-1)
    number = flat.to(torch.float64)
    return {
        DIGEST: hashlib.sha256(flat.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype),
        "norm": torch.linalg.vector_norm(number),
        "every k-th": flat[:: -(-flat.numel() // _KEPT_WHOLE)].clone(),
    }
