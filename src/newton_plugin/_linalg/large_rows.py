"""Arithmetic on rows (N, m) that are too large to be copied: part by part, without a float64 copy of the whole.

A batch of 128 samples with 50,000 outputs is 25 MB in float32 and 50 MB in float64. To read it takes a millisecond or
two. A fresh float64 copy takes 24, most of it in the operating system for new pages, and a formula written in tensors
makes a dozen such copies. Here the rows stay in their own dtype. A part that fits in the cache is converted, used and
dropped, then the next. Every sum is formed in float64 (float32 where the device has no float64). Every result is
written once, in the dtype of the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from newton_plugin._linalg.damped_inverse import Inverse, working_dtype
from newton_plugin._runtime.transforms import readable

__all__ = [
    "are_large",
    "combine",
    "divide",
    "gram",
    "inner_products",
    "nonzero_rows",
    "solve_rows",
    "squared_norms",
    "sum_over_rows",
]

_LARGE = 2**19  # elements above which rows are taken in parts: 4 MiB in float64
_PART_ELEMENTS = 2**17  # elements of a part on a CPU: 1 MiB in float64, for its cache
_PART_ELEMENTS_OF_DEVICES = 2**24  # on an accelerator: 128 MiB, to bound the memory
_MOST_CANCELLATION = 3.0  # r in combine(): rounding stays below 5 u r <= 1e-6
_LARGEST_WEIGHT = 1e30  # well within float32
_GRAM_BLOCKS = 4  # per side of a Gram matrix; blocks above the diagonal are not computed


def are_large(rows: Tensor) -> bool:
    """Whether rows (N, m) are worked on in parts. Not under ``vmap``, whose members are one tensor, nor compiled."""
    return rows.numel() >= _LARGE and readable(rows)


def _part_elements(device: torch.device) -> int:
    return _PART_ELEMENTS if device.type == "cpu" else _PART_ELEMENTS_OF_DEVICES


def _parts(length: int, width: int, device: torch.device, multiple: int = 1) -> Iterator[slice]:
    """Slices of ``range(length)``, whole multiples of ``multiple`` long, whose length times width fits in the cache."""
    size = max(1, _part_elements(device) // max(1, width * multiple)) * multiple
    return (slice(first, min(first + size, length)) for first in range(0, length, size))


def _row_parts(rows: Tensor, multiple: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, in the working dtype."""
    dtype = working_dtype(rows.device)
    for at in _parts(rows.shape[0], rows.shape[1], rows.device, multiple):
        yield at, rows[at].to(dtype)


def _column_parts(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some columns at a time, in the working dtype and in memory of their own."""
    dtype = working_dtype(rows.device)
    for at in _parts(rows.shape[1], rows.shape[0], rows.device):
        yield at, rows[:, at].to(dtype, copy=True, memory_format=torch.contiguous_format)


def _pieces(rows: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """As :func:`_row_parts`, of rows that may each be larger than a part: then some columns of one row at a time."""
    n, m = rows.shape
    if m <= _part_elements(rows.device):
        yield from (((at, slice(None)), part) for at, part in _row_parts(rows))
        return
    dtype = working_dtype(rows.device)
    for row in range(n):
        for columns in _parts(m, 1, rows.device):
            at = slice(row, row + 1), columns
            yield at, rows[at].to(dtype)


def _sums(rows: Tensor, term: Callable[[tuple[slice, slice], Tensor], Tensor]) -> Tensor:
    """The sums over the pieces of each row, (N,)."""
    total = rows.new_zeros(rows.shape[0], dtype=working_dtype(rows.device))
    for at, piece in _pieces(rows):
        total[at[0]] += term(at, piece)
    return total


def squared_norms(rows: Tensor) -> Tensor:
    """``|g_i|^2``, (N,)."""
    if not are_large(rows):
        return torch.linalg.vecdot(rows, rows)
    return _sums(rows, lambda _, piece: torch.linalg.vector_norm(piece, dim=-1).square())


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """``a_i' b_i``, (N,)."""
    if not are_large(a):
        return torch.linalg.vecdot(a, b)
    return _sums(a, lambda at, piece: torch.linalg.vecdot(piece, b[at].to(piece.dtype)))


def sum_over_rows(rows: Tensor, term: Callable[[Tensor], Tensor], multiple: int = 1) -> Tensor:
    """The sum of ``term(part)`` over all parts of the rows; a part has a whole multiple of ``multiple`` rows."""
    if not are_large(rows):
        return term(rows)
    total = None
    for _, part in _row_parts(rows, multiple):
        total = term(part) if total is None else total.add_(term(part))
    assert total is not None
    return total


def gram(rows: Tensor) -> Tensor:
    """``G G'``, (N, N), in the working dtype."""
    if not are_large(rows):
        rows = rows.to(working_dtype(rows.device))
        return rows @ rows.mT
    n = rows.shape[0]
    total = rows.new_zeros(n, n, dtype=working_dtype(rows.device))
    bounds = (
        [n * k // _GRAM_BLOCKS for k in range(_GRAM_BLOCKS + 1)]
        if rows.device.type == "cpu" and n >= 8 * _GRAM_BLOCKS
        else [0, n]
    )
    for _, part in _column_parts(rows):
        for first, last in itertools.pairwise(bounds):
            total[first:last, :last].addmm_(part[first:last], part[:last].mT)
    return total if len(bounds) == 2 else total.tril() + total.tril(-1).mT


def combine(matrix: Tensor, rows: Tensor, products: Tensor) -> Tensor:
    """``A G``, in the dtype of the rows; A is (K, N), and ``products`` GG' up to a factor.

    Rows in float32 are multiplied in float32 where N x N numbers show that nothing cancels: the rounding of row i is
    ``3 to 5 u r_i``, with u = 2^-24 and ``r_i^2 = sum_j A_ij^2 |g_j|^2 / |sum_j A_ij g_j|^2`` (measured, r from 1 to
    100). It looks at the numbers and would wait for an accelerator, so only CPUs do it.
    """
    if not are_large(rows):
        return (matrix @ rows.to(matrix.dtype)).to(rows.dtype)
    if rows.dtype == torch.float32 and rows.device.type == "cpu":
        apart = matrix.square() @ products.diagonal()
        together = ((matrix @ products) * matrix).sum(-1)
        if bool((apart <= _MOST_CANCELLATION**2 * together).all()) and bool(matrix.abs().amax() < _LARGEST_WEIGHT):
            return matrix.float() @ rows
    result = rows.new_empty(matrix.shape[0], rows.shape[1])
    for at, part in _column_parts(rows):
        result[:, at] = matrix @ part
    return result


def divide(rows: Tensor, by: Tensor, factor: Tensor | None = None) -> Tensor:
    """``f g_i / b_i``, in the dtype of the rows, rounded once.

    b is (N,) or one number for all, f one number (None: 1), in the working dtype, and may be outside the range of the
    rows' dtype.
    """
    by = by if factor is None else by / factor
    if not are_large(rows):
        return rows / by.unsqueeze(-1)
    result = torch.empty_like(rows)
    for at, piece in _pieces(rows):
        result[at] = piece / (by[at[0]].unsqueeze(-1) if by.ndim else by)
    return result


def solve_rows(
    inverse: Inverse,
    rows: Tensor,
    own: float,
    unit: Tensor | None = None,
    multiple: int = 1,
    factor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The step of every row, times the factor, and ``g_i' A^-1 g_i``, (N, 1), finite only if the row and its step are.

    Args:
        inverse: rows, any whole multiple of ``multiple``, to ``A^-1 g``.
        rows: G, (N, m).
        own: the weight w of a row's own ``g g'`` beside A, by the formula of Sherman and Morrison:
            ``(A + w g g')^-1 g = A^-1 g / (1 + w g' A^-1 g)``.
        unit: the factor by which ``g g'`` of each row is too large; None: 1.
        multiple: how many consecutive rows belong together.
        factor: no dimensions; None: 1. Rows that are not large have none.
    """
    if not are_large(rows):
        return _solve_rows(inverse, rows, own, unit)
    step, inner = torch.empty_like(rows), rows.new_empty(rows.shape[0], 1, dtype=working_dtype(rows.device))
    for at, part in _row_parts(rows, multiple):
        solved, inner[at] = _solve_rows(inverse, part, own, unit)
        step[at] = solved if factor is None else solved * factor
    return step, inner


def nonzero_rows(rows: Tensor) -> Tensor:
    """Which rows hold anything but zeros, (N,)."""
    if rows.device.type != "cpu" or not are_large(rows):
        return rows.any(-1)
    # Two reductions of another kind take a quarter of the time of any(). A NaN is not zero.
    return (rows.amax(-1) != 0) | (rows.amin(-1) != 0)


def _solve_rows(inverse: Inverse, rows: Tensor, own: float, unit: Tensor | None) -> tuple[Tensor, Tensor]:
    step = inverse(rows)
    inner = (rows * step).sum(-1, keepdim=True)
    inner = inner if unit is None else inner / unit
    return (step / torch.rsub(inner, 1.0, alpha=-own) if own else step), inner
