"""What autograd Functions need under torch.func: which transforms are around, and batch dimensions under vmap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from newton_plugin.convex._status import NestedForwardError

__all__ = ["flatten_mapped", "refuse_nested_forward", "under_transform"]


def under_transform() -> bool:
    """Whether tensors may be wrapped: by a transform of torch.func, by forward mode, or by ``is_grads_batched``."""
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 - no type stubs for it
    if functorch.peek_interpreter_stack() is not None or getattr(forward_ad, "_current_level") >= 0:  # noqa: B009
        return True
    batched = torch._C._vmapmode_increment_nesting() > 1  # type: ignore[attr-defined]
    torch._C._vmapmode_decrement_nesting()  # type: ignore[attr-defined]
    return batched


def refuse_nested_forward() -> None:
    """Raise inside jacfwd(jacfwd(f)): PyTorch (2.6 to 2.13) drops the outer tangent inside a Function's jvp."""
    functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009 - no type stubs for it
    stack = functorch.get_interpreter_stack() or []
    if sum(level.key() == functorch.TransformType.Jvp for level in stack) > 1:
        raise NestedForwardError(
            "forward-mode derivatives of forward-mode derivatives, e.g. jacfwd(jacfwd(f)), come out wrong for custom "
            "functions in PyTorch. Use torch.func.hessian(f), jacfwd(jacrev(f)) or jacrev(jacrev(f)) instead."
        )


def flatten_mapped(value: Any, dim: int | None, size: int, batch: int, matrix_ndim: int | None) -> Any:
    """Merge a mapped dimension into the batch: (V, B, ...) -> (V B, ...).

    A shared matrix (``matrix_ndim`` dimensions, not mapped) stays shared; everything else is expanded.
    """
    if not isinstance(value, Tensor):
        return value
    if dim is None:
        if value.ndim == matrix_ndim:
            return value
        return value.unsqueeze(0).expand(size, *value.shape).flatten(0, 1)
    value = value.movedim(dim, 0)
    if matrix_ndim is not None and value.ndim == matrix_ndim + 1:  # shared by the inner batch only
        value = value.unsqueeze(1).expand(size, batch, *value.shape[1:])
    return value.flatten(0, 1)
