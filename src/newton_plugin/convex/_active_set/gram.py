"""The matrix S = C Q^-1 C' of block principal pivoting: as a whole, or only the part that is needed.

Both classes solve ``S_FF y_F = -s0_F`` for a guessed set of active rows F in each problem. They keep the factor of the
last guess, which is the factor of the optimality system.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from newton_plugin.convex._system.problem import Problem
from newton_plugin.convex._system.products import back_substitute, pad_rows, round_up, times
from newton_plugin.convex._system.rows import compress, join, masked_cholesky, take_rows, whiten

__all__ = ["Gram", "PooledGram", "SharedGram"]

_TILE = 24


class Gram(Protocol):
    """``live``: the batch indices that are still being solved, or None for all; b of them."""

    def solve(self, live: Tensor | None, active: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Multipliers (b, K), slacks (b, K), scale of the multipliers (b, K), success (b,)."""
        ...

    def keep(self, live: Tensor | None, done: Tensor) -> None:
        """The factor of the last solve is final for these."""
        ...

    def factor(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, present and schur of all problems, as in ``Factors``."""
        ...


class SharedGram:
    """One S for all problems."""

    def __init__(self, problem: Problem, cholesky: Tensor, slack: Tensor) -> None:
        V = whiten(cholesky, problem.C)
        self.S = V.mT @ V
        self.size = self.S.diagonal().sqrt()
        self.slack = slack
        self.parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def solve(self, live: Tensor | None, active: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slack = self.slack if live is None else self.slack[live]
        rows, present = compress(active, 8 if self.S.shape[1] > _TILE else _TILE)
        if len(rows) == 1:  # taking whole rows and columns is many times as fast as taking single entries
            sub = self.S.index_select(0, rows[0]).index_select(1, rows[0]).unsqueeze(0)
        else:
            sub = self.S.view(-1)[rows.unsqueeze(-1) * self.S.shape[1] + rows.unsqueeze(-2)]
        factor, ok = masked_cholesky(sub, present)
        right = torch.where(present, -slack.gather(1, rows), 0.0).unsqueeze(-1)
        yw = torch.cholesky_solve(right, factor).squeeze(-1)
        y = torch.zeros_like(slack).scatter_add_(1, rows, torch.where(present, yw, 0.0))
        s = slack + (pad_rows(y) @ self.S)[: len(y)]
        self.last = rows, present, factor
        return y, s, self.size.expand_as(y), ok

    def keep(self, live: Tensor | None, done: Tensor) -> None:
        index = done.nonzero().squeeze(-1)
        rows, present, factor = self.last
        where = index if live is None else live[index]
        self.parts.append((where, rows[index], present[index], factor[index]))

    def factor(self) -> tuple[Tensor, Tensor, Tensor]:
        f = max((rows.shape[1] for _, rows, _, _ in self.parts), default=0)
        return join([self.slack.shape[0], f], self.parts, self.slack)


class PooledGram:
    """Each problem has its own V and S, for the rows that were ever guessed active."""

    def __init__(self, problem: Problem, cholesky: Tensor, slack: Tensor) -> None:
        self.C, self.cholesky, self.slack = problem.C, cholesky, slack
        batch, n = problem.p.shape
        self.slot = torch.full_like(slack, -1, dtype=torch.long)  # (B, K): where in the pool, -1 if not
        self.rows = self.slot[:, :0]
        self.V = slack.new_zeros(batch, n, 0)
        self.S = slack.new_zeros(batch, 0, 0)
        self.schur = self.S
        self.present = self.rows.bool()

    def _enter(self, live: Tensor | None, wanted: Tensor) -> None:
        slot = self.slot if live is None else self.slot[live]
        new = wanted & (slot < 0)
        if not bool(new.any()):
            return
        held = (slot >= 0).sum(-1, keepdim=True)
        place = torch.where(new, new.cumsum(-1) - 1 + held, slot)
        width = round_up(int(place.amax() + 1), _TILE)
        if width > self.rows.shape[1]:
            self._widen(width)
        index, present = compress(new, _TILE)
        where = place.gather(1, index) * present
        cholesky = self.cholesky if live is None or self.cholesky.ndim == 2 else self.cholesky[live]
        C = self.C if live is None or self.C.ndim == 2 else self.C[live]
        columns = whiten(cholesky, take_rows(C, index)) * present.unsqueeze(-2)
        V = self.V if live is None else self.V[live]
        V.scatter_add_(2, where.unsqueeze(1).expand_as(columns), columns)
        cross = V.mT @ columns  # (b, P, w)
        S = self.S if live is None else self.S[live]
        S.scatter_add_(2, where.unsqueeze(1).expand_as(cross), cross)
        is_new = torch.zeros_like(V[:, 0], dtype=torch.bool).scatter_(1, where, present)
        # Absent rows point to place 0, where the scatter above may have written False over True.
        is_new[:, 0] = (where.eq(0) & present).any(-1)
        old = (cross * ~is_new.unsqueeze(-1)).mT
        S.scatter_add_(1, where.unsqueeze(-1).expand_as(old), old)
        rows = self.rows if live is None else self.rows[live]
        rows.scatter_add_(1, where, index * present)
        if live is None:
            self.slot = place
        else:
            self.V[live], self.S[live], self.rows[live], self.slot[live] = V, S, rows, place

    def _widen(self, width: int) -> None:
        extra = width - self.rows.shape[1]
        pad = torch.nn.functional.pad
        self.rows, self.V = pad(self.rows, (0, extra)), pad(self.V, (0, extra))
        self.S = pad(self.S, (0, extra, 0, extra))
        self.present = pad(self.present, (0, extra))
        self.schur = pad(self.schur, (0, extra, 0, extra))
        self.schur.diagonal(dim1=-2, dim2=-1)[:, -extra:] = 1.0

    def solve(self, live: Tensor | None, active: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self._enter(live, active)

        def pick(t: Tensor) -> Tensor:
            return t if live is None else t[live]

        rows, V, slack, slot = pick(self.rows), pick(self.V), pick(self.slack), pick(self.slot)
        filled = torch.arange(rows.shape[1], device=rows.device) < (slot >= 0).sum(-1, keepdim=True)
        present = active.gather(1, rows) & filled
        S = pick(self.S)
        factor, ok = masked_cholesky(S, present)
        right = torch.where(present, -slack.gather(1, rows), 0.0).unsqueeze(-1)
        yw = torch.where(present, torch.cholesky_solve(right, factor).squeeze(-1), 0.0)
        y = torch.zeros_like(slack).scatter_add_(1, rows, yw)
        cholesky = self.cholesky if self.cholesky.ndim == 2 else pick(self.cholesky)
        step = back_substitute(cholesky, (V * yw.unsqueeze(-2)).sum(-1))
        C = self.C if self.C.ndim == 2 else pick(self.C)
        s = slack + times(C, step)
        size = torch.zeros_like(slack)
        size.scatter_add_(1, rows, torch.where(filled, S.diagonal(dim1=-2, dim2=-1).sqrt(), 0.0))
        self.last = present, factor
        return y, s, size, ok

    def keep(self, live: Tensor | None, done: Tensor) -> None:
        present, factor = self.last
        if live is None and bool(done.all()):
            self.present, self.schur = present, factor
            return
        index = done.nonzero().squeeze(-1)
        target = index if live is None else live[index]
        self.present[target], self.schur[target] = present[index], factor[index]

    def factor(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows, self.present, self.schur
