"""From the user's Q, p, A, b, G, h, with any batch dimensions, to the Q, p, C, c of :class:`Problem`."""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin._errors import ShapeError
from newton_plugin.convex._system.products import round_up

__all__ = ["batch_shape", "flat_matrix", "flat_vector", "standard_form"]


_UNBOUNDED = 1e300  # stands for h = +inf: infinity would make NaN in products


def batch_shape(Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> torch.Size:
    """The leading dimensions of all six together."""
    lead = [t.shape[:-2] for t in (Q, A, G)] + [t.shape[:-1] for t in (p, b, h)]
    several = {shape for shape in lead if shape}
    if len(several) <= 1:  # the usual case; broadcast_shapes takes a tenth of a small problem's time
        return several.pop() if several else torch.Size()
    try:
        return torch.broadcast_shapes(*several)
    except RuntimeError:
        listed = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip("QpAbGh", (Q, p, A, b, G, h), strict=True))
        raise ShapeError(
            f"the leading batch dimensions do not broadcast: {listed}. Shared data have no batch dimension."
        ) from None


def flat_matrix(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Shared matrices stay (r, n), others become (B, r, n)."""
    if tensor.ndim == 2:
        return tensor
    return tensor.expand(*shape, *tensor.shape[-2:]).reshape(shape.numel(), *tensor.shape[-2:])


def flat_vector(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Vectors always become (B, r)."""
    return tensor.expand(*shape, tensor.shape[-1]).reshape(shape.numel(), tensor.shape[-1])


def _stack_rows(
    A: Tensor, b: Tensor, G: Tensor, h: Tensor, n: int, rows: int, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """C (K, n) or (B, K, n) and c (B, K), K = ``rows``: the rows that are missing are ``0 x <= 1``."""
    matrices = [flat_matrix(t, shape) for t in (A, G) if t.shape[-2]]
    batch = shape.numel()
    if any(t.ndim == 3 for t in matrices):
        matrices = [t.expand(batch, *t.shape[-2:]) for t in matrices]
    columns = A.shape[-1]
    missing = rows - A.shape[-2] - G.shape[-2]
    if missing:
        lead = matrices[0].shape[:-2] if matrices else ()
        matrices.append(A.new_zeros(*lead, missing, columns))
    C = matrices[0] if len(matrices) == 1 else torch.cat(matrices, -2) if matrices else A
    if columns != n:
        C = torch.nn.functional.pad(C, (0, n - columns))
    h = h.clamp(-_UNBOUNDED, _UNBOUNDED)
    c = torch.cat((flat_vector(b, shape), flat_vector(h, shape), b.new_ones(batch, missing)), -1)
    return C, c


def standard_form(
    Q: Tensor, p: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q, p, C, c of :class:`Problem`: an even number of variables, a multiple of 8 rows (``products.py`` says why).

    Where n is odd, one variable is added: it has no constraint, and its minimiser is 0.
    """
    n = p.shape[-1]
    even, rows = round_up(n, 2), round_up(max(b.shape[-1] + h.shape[-1], 1), 8)
    if even != n:
        Q = torch.nn.functional.pad(Q, (0, 1, 0, 1))
        last = torch.zeros_like(Q[..., 0, :])
        last[..., -1] = 1.0
        Q = Q + torch.diag_embed(last)
        p = torch.nn.functional.pad(p, (0, 1))
    C, c = _stack_rows(A, b, G, h, even, rows, shape)
    return flat_matrix(Q, shape), flat_vector(p, shape), C, c
