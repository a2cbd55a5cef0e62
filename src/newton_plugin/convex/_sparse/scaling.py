"""Units of a sparse problem: the scales of its columns and rows, as ``_system/units.py`` has them for dense ones."""

from __future__ import annotations

from typing import Any

__all__ = ["scales"]

_ROUNDS = 10
_SPREAD = 64.0  # columns whose entries differ by less stay as they are, and so do all rows then


def scales(numpy: Any, Q: Any, C: Any) -> tuple[Any, Any]:
    """Scales of the columns of [Q; C] and of the rows of C, powers of two. Q (n, n) in CSC, C (K, n) in CSR."""
    np, n, count = numpy, Q.shape[0], C.shape[0]
    columns, rows = np.ones(n), np.ones(count)
    q_row, q_column = Q.indices, np.repeat(np.arange(n), np.diff(Q.indptr))
    c_column, c_row = C.indices, np.repeat(np.arange(count), np.diff(C.indptr))
    q, c = abs(Q.data), abs(C.data)

    def largest(values: Any, index: Any, size: int) -> Any:
        out = np.zeros(size)
        np.maximum.at(out, index, values)
        return np.where(out > 0, out, 1.0)

    first = c / largest(c, c_row, count)[c_row]
    column = largest(np.concatenate([q, first]), np.concatenate([q_column, c_column]), n)
    if column.max() <= _SPREAD * column.min():
        return columns, rows
    for _ in range(_ROUNDS):
        q_now, c_now = q * columns[q_row] * columns[q_column], c * rows[c_row] * columns[c_column]
        both = largest(np.concatenate([q_now, c_now]), np.concatenate([q_column, c_column]), n)
        rows = rows / np.sqrt(largest(c_now, c_row, count))
        columns = columns / np.sqrt(both)
    return np.exp2(np.round(np.log2(columns))), np.exp2(np.round(np.log2(rows)))
