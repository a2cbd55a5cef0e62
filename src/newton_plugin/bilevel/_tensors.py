# pyright: reportPrivateImportUsage=false
"""A list of tensors as one vector: the operations that the methods need, without a copy into a flat tensor.

Only :func:`numbers` waits for the device. Only :func:`assign` and those whose name ends in an underscore change an
argument. Coefficients are numbers or tensors without dimensions; :func:`axpy_each` and :func:`lerp` take one number for
each tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "Vector",
    "add",
    "assign",
    "axpy",
    "axpy_",
    "axpy_each",
    "dot",
    "lerp",
    "norm",
    "numbers",
    "scale",
    "subtract",
    "xpay_",
    "zeros_like",
]

Vector = list[Tensor]


def _total(parts: Sequence[Tensor]) -> Tensor:
    # The parts may differ in device and dtype: they meet on the first one's device, in float32 at least.
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    return torch.stack([part.to(parts[0].device, dtype) for part in parts])


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product, no dimensions."""
    parts = [torch.dot(s.reshape(-1), t.reshape(-1)) for s, t in zip(a, b, strict=True)]
    return parts[0] if len(parts) == 1 and parts[0].element_size() >= 4 else _total(parts).sum()


def norm(a: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm over all tensors, no dimensions."""
    return torch.linalg.vector_norm(_total(torch._foreach_norm(list(a))))


def numbers(parts: Sequence[Tensor]) -> list[float]:
    """Tensors without dimensions as numbers of the host, by one read of the device."""
    return _total(parts).tolist()


def scale(a: Sequence[Tensor], c: float | Tensor) -> Vector:
    """``c a``."""
    if isinstance(c, Tensor):
        return [t * c.to(t.device, t.dtype) for t in a]
    return list(torch._foreach_mul(list(a), c))


def add(a: Sequence[Tensor], b: Sequence[Tensor]) -> Vector:
    """``a + b``."""
    return list(torch._foreach_add(list(a), list(b)))


def assign(a: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write ``values`` into the tensors ``a``, which may be leaves that require grad."""
    with torch.no_grad():
        torch._foreach_copy_(list(a), list(values))


def axpy(c: float | Tensor, x: Sequence[Tensor], y: Sequence[Tensor]) -> Vector:
    """``c x + y``."""
    if isinstance(c, Tensor):
        return [torch.addcmul(yk, xk, c.to(xk.device, xk.dtype)) for xk, yk in zip(x, y, strict=True)]
    return list(torch._foreach_add(list(y), list(x), alpha=c))


def axpy_(c: float, x: Sequence[Tensor], y: Sequence[Tensor]) -> None:
    """``y += c x``, in place."""
    torch._foreach_add_(list(y), list(x), alpha=c)


def xpay_(x: Sequence[Tensor], c: float, y: Sequence[Tensor]) -> None:
    """``y = x + c y``, in place."""
    torch._foreach_mul_(list(y), c)
    torch._foreach_add_(list(y), list(x))


def axpy_each(c: Sequence[float], x: Sequence[Tensor], y: Sequence[Tensor]) -> Vector:
    """``c_k x_k + y_k``, one number for each tensor."""
    if min(c) == max(c):  # one pass over memory
        return axpy(c[0], x, y)
    return list(torch._foreach_add(list(y), torch._foreach_mul(list(x), list(c))))


def subtract(a: Sequence[Tensor], b: Sequence[Tensor]) -> Vector:
    """``a - b``."""
    return list(torch._foreach_sub(list(a), list(b)))


def lerp(a: Sequence[Tensor], b: Sequence[Tensor], c: Sequence[float]) -> Vector:
    """``(1 - c_k) a_k + c_k b_k``; beyond 1 it extrapolates."""
    if min(c) == max(c):
        return list(torch._foreach_lerp(list(a), list(b), c[0]))
    return [torch.lerp(ak, bk, ck) for ak, bk, ck in zip(a, b, c, strict=True)]


def zeros_like(a: Sequence[Tensor]) -> Vector:
    """Zeros in the shapes of ``a``."""
    return [torch.zeros_like(t) for t in a]
