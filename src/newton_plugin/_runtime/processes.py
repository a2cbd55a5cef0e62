"""Sums over the processes of a data-parallel run, so that R ranks take the step of one process with the whole batch.

What has to be shared is little: C is a mean over samples, so ranks add their sums and their sample counts, once a
step. Everything else (damping, running mean, solve) follows from C and is then the same on every rank, to the bit.

Collectives hang when ranks do not agree on which one comes next, so every decision that changes their order is
itself taken by all ranks together: which boundaries the loss has (:meth:`ProcessGroup.agree`), whether a Hessian
exists (:meth:`ProcessGroup.worst`), whether a gradient is finite (:meth:`ProcessGroup.all`).
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from newton_plugin._errors import RanksDisagreeError

__all__ = ["ONE_PROCESS", "OneProcess", "ProcessGroup", "Ranks", "current_ranks"]


class Ranks(Protocol):
    """The processes that share a batch."""

    many: bool

    def agree(self, what: str) -> None:
        """Raise on every rank unless ``what`` is the same text on all."""
        ...

    def mean(self, total: Tensor, count: int) -> Tensor:
        """Sum of ``total`` over the ranks, divided by the sum of ``count``."""
        ...

    def count(self, own: int) -> int:
        """Sum of ``own`` over the ranks."""
        ...

    def worst(self, code: int) -> int:
        """The largest ``code`` of any rank."""
        ...

    def all(self, flag: Tensor) -> Tensor:
        """Whether a boolean without dimensions holds on every rank."""
        ...

    def rows(self, own: Tensor) -> tuple[Tensor, slice]:
        """The rows (N_r, m) of every rank, (sum N_r, m), and where this rank's own are among them."""
        ...


class OneProcess:
    """No other ranks: every sum is its own."""

    many = False

    def agree(self, what: str) -> None:
        """Nobody to disagree with."""

    def mean(self, total: Tensor, count: int) -> Tensor:
        return total / count

    def count(self, own: int) -> int:
        return own

    def worst(self, code: int) -> int:
        return code

    def all(self, flag: Tensor) -> Tensor:
        return flag

    def rows(self, own: Tensor) -> tuple[Tensor, slice]:
        return own, slice(0, own.shape[0])


ONE_PROCESS = OneProcess()


class ProcessGroup:
    """All ranks of ``torch.distributed``'s default group.

    Tensors travel on their own device. The few bytes that decide what comes next travel between hosts, so that no
    rank waits for its device to read them: through the default group where that takes CPU tensors (gloo), else
    through a gloo group of its own.
    """

    many = True

    def __init__(self) -> None:
        backends = str(dist.get_backend_config())
        self._hosts = None if "gloo" in backends else dist.new_group(backend="gloo")

    def agree(self, what: str) -> None:
        own = int.from_bytes(hashlib.blake2b(what.encode(), digest_size=7).digest(), "big")
        extremes = torch.tensor([own, -own])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._hosts)
        if extremes[0] == -extremes[1]:
            return
        texts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(texts, what, group=self._hosts)
        raise RanksDisagreeError(
            "the ranks take different Newton steps, so their curvatures cannot be averaged: "
            + "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(texts))
            + ". Name one boundary that every rank reaches, make features of equal size (feature_dims=-1 for "
            "sequences of different length), or pass sync=False to give each rank the C of its own samples."
        )

    def mean(self, total: Tensor, count: int) -> Tensor:
        flat = torch.cat([total.reshape(-1), total.new_full((1,), count)])
        dist.all_reduce(flat)
        return (flat[:-1] / flat[-1].clamp_min(1)).view_as(total)

    def count(self, own: int) -> int:
        counted = torch.tensor([own])
        dist.all_reduce(counted, group=self._hosts)
        return int(counted)

    def worst(self, code: int) -> int:
        codes = torch.tensor([code])
        dist.all_reduce(codes, dist.ReduceOp.MAX, group=self._hosts)
        return int(codes)

    def all(self, flag: Tensor) -> Tensor:
        failed = (~flag).to(torch.int32)
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        return failed == 0

    def rows(self, own: Tensor) -> tuple[Tensor, slice]:
        counts = torch.zeros(dist.get_world_size(), dtype=torch.int64)
        counts[dist.get_rank()] = own.shape[0]
        dist.all_reduce(counts, group=self._hosts)
        most = int(counts.max())
        padded = own.new_zeros(most, own.shape[1])
        padded[: own.shape[0]] = own
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        first = int(counts[: dist.get_rank()].sum())
        rows = torch.cat([part[:n] for part, n in zip(parts, counts.tolist(), strict=True)])
        return rows, slice(first, first + own.shape[0])


def current_ranks(sync: bool) -> Ranks:
    """The processes to average over now: this one alone unless ``sync`` and a process group of several runs."""
    if not (sync and dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ONE_PROCESS
    return _group_of(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _group_of(world: Any) -> ProcessGroup:
    """One for each life of the default group: a new one may follow a destroyed one within the same process."""
    return ProcessGroup()
