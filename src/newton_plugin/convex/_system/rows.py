"""The working rows of a batch: as lists of indices of equal width, whitened, and factored."""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin.convex._system.products import round_up

__all__ = ["compress", "join", "masked_cholesky", "take_rows", "whiten"]

_DEPENDENT = 1e-9  # squared sine of the angle to the other rows, below which Cholesky loses too many digits


def compress(mask: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
    """Indices of the true entries, in order: (B, K) -> index (B, f), present (B, f), f the largest count.

    >>> index, present = compress(torch.tensor([[False, True, True], [True, False, False]]))
    >>> index.tolist(), present.tolist()
    ([[1, 2], [0, 0]], [[True, True], [True, False]])
    """
    count = mask.sum(-1)
    f = round_up(int(count.max()), multiple) if mask.shape[-1] else 0
    place = torch.where(mask, mask.cumsum(-1) - 1, f)
    index = mask.new_zeros(mask.shape[0], f + 1, dtype=torch.long)
    index.scatter_(1, place, torch.arange(mask.shape[1], device=mask.device).expand_as(place))
    present = torch.arange(f, device=mask.device) < count.unsqueeze(-1)
    return index[:, :f] * present, present


def whiten(cholesky: Tensor, rows: Tensor) -> Tensor:
    """``V = L^-1 R'``: rows R (..., f, n) -> (..., n, f)."""
    if cholesky.ndim == 2 and rows.ndim == 3:
        batch, f, n = rows.shape
        flat = torch.linalg.solve_triangular(cholesky, rows.reshape(batch * f, n).mT, upper=False)
        return flat.mT.reshape(batch, f, n).mT
    return torch.linalg.solve_triangular(cholesky, rows.mT, upper=False)


def take_rows(C: Tensor, index: Tensor) -> Tensor:
    """Rows (B, f) of C (K, n) or (B, K, n) -> (B, f, n)."""
    if C.ndim == 2:
        return C[index]
    flat = index + torch.arange(C.shape[0], device=C.device).unsqueeze(-1) * C.shape[1]
    return C.reshape(-1, C.shape[2])[flat]


def masked_cholesky(S: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """The factor of S at the present rows (the identity elsewhere), and whether these rows are independent."""
    M = S * (present.unsqueeze(-1) & present.unsqueeze(-2))
    size = M.diagonal(dim1=-2, dim2=-1)
    size.add_((~present).to(M.dtype))
    size = size.clone()
    factor, info = torch.linalg.cholesky_ex(M)
    pivots = factor.diagonal(dim1=-2, dim2=-1).square()
    return factor, (info == 0) & (pivots > _DEPENDENT * size).all(-1)


def join(
    shape: list[int], parts: list[tuple[Tensor, Tensor, Tensor, Tensor]], like: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Put factors (index, rows, present, schur) of different widths into one batch of width f."""
    batch, f = shape
    rows = like.new_zeros(batch, f, dtype=torch.long)
    present = like.new_zeros(batch, f, dtype=torch.bool)
    schur = torch.eye(f, dtype=like.dtype, device=like.device).repeat(batch, 1, 1)
    for index, part_rows, part_present, part_schur in parts:
        width = part_rows.shape[1]
        rows[index, :width] = part_rows
        present[index, :width] = part_present
        schur[index, :width, :width] = part_schur
    return rows, present, schur
