"""Sums over the processes of a data-parallel run, so that R ranks take the step of one process with the whole batch.

C is a mean over samples, so once a step the ranks add up their sums and their sample counts. Everything else (damping,
running mean, solve) follows from C and is the same on every rank, to the bit.

Collectives hang when ranks disagree on which one comes next. Every decision that changes their order is therefore taken
by all ranks together: which boundaries the loss has (:meth:`Ranks.agree`), whether a Hessian exists
(:meth:`Ranks.worst`), whether a gradient is finite (:meth:`Ranks.all`).
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
    """The processes that share a batch.

    Attributes:
        many: whether there is more than one.
    """

    many: bool

    def agree(self, what: str) -> None:
        """Raise :class:`RanksDisagreeError` on every rank unless all ranks pass the same text."""
        ...

    def mean(self, total: Tensor, count: Tensor | int) -> Tensor:
        """The sum of ``total`` over the ranks, divided by the sum of ``count``."""
        ...

    def sum(self, value: Tensor) -> Tensor:
        """The sum of ``value`` over the ranks."""
        ...

    def count(self, own: int) -> int:
        """The sum of ``own`` over the ranks."""
        ...

    def worst(self, code: int) -> int:
        """The largest ``code`` of any rank."""
        ...

    def all(self, flag: Tensor) -> Tensor:
        """Whether ``flag``, a boolean without dimensions, is true on every rank."""
        ...

    def rows(self, own: Tensor) -> tuple[Tensor, slice]:
        """The rows (N_r, m) of all ranks together, (sum N_r, m), and the slice of them that this rank passed."""
        ...


class OneProcess:
    """One process alone: every sum over the ranks is its own."""

    many = False

    def agree(self, what: str) -> None:
        """Does nothing: there is no other rank."""

    def mean(self, total: Tensor, count: Tensor | int) -> Tensor:
        return total / count

    def sum(self, value: Tensor) -> Tensor:
        return value

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

    Tensors are exchanged on their own device. The few bytes that decide what comes next are exchanged between hosts, so
    that no rank waits for its device to read them: by the default group if its backend takes CPU tensors (gloo), else
    by a gloo group made for this.
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
            "sequences of different length), or pass sync=False to give each rank the C of its own samples (also under "
            "torch.distributed.algorithms.Join, where a rank that has run out of data takes no steps)."
        )

    def mean(self, total: Tensor, count: Tensor | int) -> Tensor:
        counts = count.to(total) if isinstance(count, Tensor) else total.new_full((), count)
        flat = torch.cat([total.reshape(-1), counts.reshape(-1)])
        dist.all_reduce(flat)
        summed, of = flat.split([total.numel(), counts.numel()])
        return summed.view_as(total) / of.view_as(counts).clamp_min(1)

    def sum(self, value: Tensor) -> Tensor:
        summed = value.clone()
        dist.all_reduce(summed)
        return summed

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
    """The processes to average over now: with ``sync`` those of the default group, else this one alone."""
    if not (sync and dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ONE_PROCESS
    return _group_of(dist.group.WORLD)


@functools.lru_cache(maxsize=1)
def _group_of(world: Any) -> ProcessGroup:
    """The :class:`ProcessGroup` of a default group. A process may destroy its default group and start another."""
    return ProcessGroup()
