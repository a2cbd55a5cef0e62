"""How many rows count as samples of a loss."""

from __future__ import annotations

from torch import Tensor

from newton_plugin._linalg.large_rows import nonzero_rows

__all__ = ["all_if_none", "live_rows"]


def live_rows(rows: Tensor) -> Tensor:
    """How many rows have a gradient: what a loss ignores has none, and is no sample of it. All rows if none has one."""
    return all_if_none(nonzero_rows(rows).sum(), len(rows))


def all_if_none(live: Tensor, rows: int) -> Tensor:
    """``live``, or the number of rows where it is zero: a batch that is solved counts as it is."""
    return live.masked_fill(live == 0, rows)
