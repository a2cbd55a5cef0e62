"""Products and triangular solves for batches whose matrices may be shared.

Each problem of a batch has its own vector, (B, n). Matrices are shared, (n, n), or belong to one problem each,
(B, n, n). A shared matrix meets all vectors in one matrix product; this is why sharing is fast.

**Bits.** The result of one problem should not depend on its neighbours: a failing problem must leave the others
*bit-equal* to being solved alone. BLAS does not promise that. It computes a product of one column in another way than a
product of 64, and it sums the tail of a block in another order than its body. Measured (torch's MKL, on a CPU with
AVX-512): every entry has the same bits wherever it stands if row lengths are even, rows are padded to multiples of 8,
and widths of Gram matrices to multiples of 24 (the tile of the double-precision kernel). The product of a problem's own
matrix and vector is a multiplication and a sum: this has the property anyway, and for a batch it is 3 times as fast as
the batched matrix product. One dependence remains: the width of the triangular solves with the working rows is the
largest in the batch. Up to 24 rows of constraints that width is fixed, so bits are equal; beyond, results agree to
rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["back_substitute", "cholesky_apply", "pad_rows", "round_up", "times", "times_transposed"]


def round_up(number: int, multiple: int) -> int:
    """The least multiple of ``multiple`` that is not below ``number``."""
    return -(-number // multiple) * multiple


def pad_rows(vectors: Tensor) -> Tensor:
    """(B, n) with zero rows up to a multiple of 8."""
    missing = -vectors.shape[0] % 8
    return torch.nn.functional.pad(vectors, (0, 0, 0, missing)) if missing else vectors


def times(matrix: Tensor, vectors: Tensor) -> Tensor:
    """``M v``: M (k, n) or (B, k, n), v (B, n) or (B, n, r) -> (B, k) or (B, k, r)."""
    if vectors.ndim == 3:
        if vectors.shape[-1] == 1:
            return times(matrix, vectors.squeeze(-1)).unsqueeze(-1)
        return matrix @ vectors
    if matrix.ndim == 2:
        return (pad_rows(vectors) @ matrix.mT)[: vectors.shape[0]]
    return (matrix * vectors.unsqueeze(-2)).sum(-1)


def times_transposed(matrix: Tensor, vectors: Tensor) -> Tensor:
    """``M' w``: M (k, n) or (B, k, n), w (B, k) or (B, k, r) -> (B, n) or (B, n, r)."""
    if vectors.ndim == 3:
        if vectors.shape[-1] == 1:
            return times_transposed(matrix, vectors.squeeze(-1)).unsqueeze(-1)
        return matrix.mT @ vectors
    if matrix.ndim == 2:
        return (pad_rows(vectors) @ matrix)[: vectors.shape[0]]
    return (matrix * vectors.unsqueeze(-1)).sum(-2)


def cholesky_apply(factor: Tensor, vectors: Tensor) -> Tensor:
    """``(L L')^-1 v``: L (n, n) or (B, n, n), v (B, n) or (B, n, r)."""
    if factor.ndim == 3:
        columns = vectors if vectors.ndim == 3 else vectors.unsqueeze(-1)
        solved = torch.cholesky_solve(columns, factor)
        return solved if vectors.ndim == 3 else solved.squeeze(-1)
    if vectors.ndim == 2:
        return torch.cholesky_solve(pad_rows(vectors).mT, factor).mT[: vectors.shape[0]]
    batch, n, r = vectors.shape
    rows = vectors.movedim(1, 2).reshape(batch * r, n)
    return cholesky_apply(factor, rows).reshape(batch, r, n).movedim(1, 2)


def back_substitute(factor: Tensor, vectors: Tensor) -> Tensor:
    """``L'^-1 v``: L (n, n) or (B, n, n), v (B, n)."""
    if factor.ndim == 3:
        return torch.linalg.solve_triangular(factor.mT, vectors.unsqueeze(-1), upper=True).squeeze(-1)
    return torch.linalg.solve_triangular(factor.mT, pad_rows(vectors).mT, upper=True).mT[: vectors.shape[0]]
