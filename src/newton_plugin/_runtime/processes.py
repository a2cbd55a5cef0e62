"""Sums over the processes of a data-parallel run, so that R ranks take the step of one process with the whole batch.

C is a mean over samples, so once a step the ranks add up their sums and their sample counts. Everything else (damping,
running mean, solve) follows from C and is the same on every rank, to the bit.

Collectives hang when ranks disagree on which one comes next. A step therefore begins with one all-reduce of a fixed
size (:meth:`ProcessGroup.exchange` or :meth:`ProcessGroup.agree`), which no rank leaves out. It tells whether all ranks
are about to take the same step, and carries what the step needs of all of them if that is a few numbers. Whatever comes
next follows from what all ranks know then. ``_step/exchange.py`` says what travels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NoReturn, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from newton_plugin._errors import RanksDisagreeError
from newton_plugin._runtime.agreement import CODES, Verdict, all_equal, code_of, codes_of, were_equal
from newton_plugin._runtime.cuda_graphs import capturing

__all__ = ["ONE_PROCESS", "ROOM", "OneProcess", "ProcessGroup", "Ranks", "current_ranks", "finish_exchanges"]

ROOM = 128 - CODES  # numbers that an exchange carries beside the agreement: 1 kB in all


class Ranks(Protocol):
    """The processes that share a batch.

    Attributes:
        many: whether there is more than one.
        known: what a curvature has named before its step, and has been added up; see ``Curvature.statistics``.
        covers: whether sums cover the samples of this step, as all but those of ``sync="lagged"`` do. What is finite
            in a sum is then finite on every rank.
    """

    many: bool
    known: Any
    covers: bool

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
    known = None
    covers = True

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

    With ``later``, whether the ranks agree is read at the next exchange or :meth:`settle`, when it has long been
    copied to the host. Ranks that disagree take no step until then: their sums are NaN.

    Attributes:
        device: of the last step, for a rank whose next loss has no boundary that would tell.
    """

    many = True
    known = None
    covers = True

    def __init__(self) -> None:
        backends = str(dist.get_backend_config())
        self._hosts = None if "gloo" in backends else dist.new_group(backend="gloo")
        self._size = dist.get_world_size()  # kept: sums may be taken in after the group is destroyed
        self._running: Callable[[], None] | None = None
        self._unread: list[Verdict] = []
        self._taken_in: Verdict | None = None  # of what was started; read where all ranks take part
        self.device: torch.device | None = None

    def agree(self, what: str) -> None:
        """:meth:`exchange` without numbers: 16 bytes between the hosts.

        Raises:
            RanksDisagreeError: on every rank, unless all ranks pass the same ``what``.
        """
        self.settle()
        own = code_of(what)
        extremes = torch.tensor([own, -own])
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=self._hosts)
        if extremes[0] != -extremes[1]:
            self._disagree(what)

    def exchange(self, what: str, numbers: Tensor, later: bool = False) -> tuple[Tensor, Tensor | None]:
        """The sums of ``numbers`` over the ranks, by the one all-reduce with which a step begins.

        It has the same size whatever ``what`` and ``numbers`` are, so ranks that disagree do not hang.

        Args:
            what: what this rank is about to do, to the last detail that decides which collectives follow.
            numbers: (k,), k up to ``ROOM``; on the device where the step is made, or of the host.
            later: do not wait for the device to learn whether the ranks agree.

        Returns:
            The sums, and with ``later`` whether the ranks agree, a tensor without dimensions, else None.

        Raises:
            RanksDisagreeError: on every rank, unless all ranks pass the same ``what``; with ``later`` at the next call.
        """
        self.settle()
        vector = self._vector(what, numbers)
        dist.all_reduce(vector, group=self._group_of(vector))
        sums = vector[CODES : CODES + numbers.numel()]
        if not later:
            if not were_equal(vector[:CODES].tolist(), self._size):
                self._disagree(what)
            return sums, None
        agreed = all_equal(vector[:CODES], self._size)
        if not capturing(vector):  # a replay of a CUDA graph runs none of this
            self._unread.append(Verdict.of(agreed, what))
        return torch.where(agreed, sums, math.nan), agreed

    def start(self, what: str, numbers: Tensor, deliver: Callable[[Tensor], None]) -> None:
        """Begin an :meth:`exchange` which the next :meth:`settle` ends: it passes the sums to ``deliver``."""
        self.settle()
        vector = self._vector(what, numbers)
        work = dist.all_reduce(vector, group=self._group_of(vector), async_op=True)

        def finish() -> None:
            assert work is not None
            work.wait()
            agreed = all_equal(vector[:CODES], self._size)
            deliver(torch.where(agreed, vector[CODES : CODES + numbers.numel()], math.nan))
            self._taken_in = Verdict.of(agreed, what)

        self._running = finish

    def finish(self) -> None:
        """Take in what :meth:`start` began. One rank alone may do so: it neither talks to others nor raises."""
        running, self._running = self._running, None
        if running is not None:
            running()

    def settle(self) -> None:
        """:meth:`finish`, and raise if the ranks did not agree at an exchange whose verdict has reached the host."""
        self._read()
        self.finish()
        # One rank may have taken in its sums before, for a checkpoint: all ranks read the verdict at the same call.
        taken_in, self._taken_in = self._taken_in, None
        if taken_in is not None:
            self._unread.append(taken_in)
            if taken_in.copied is None:
                self._read()

    def _read(self) -> None:
        unread, self._unread = self._unread, []
        for verdict in unread:
            if not verdict.read():
                self._disagree(verdict.what)

    def _vector(self, what: str, numbers: Tensor) -> Tensor:
        codes = codes_of(what, numbers.dtype, numbers.device)
        return torch.cat([codes, numbers, numbers.new_zeros(ROOM - numbers.numel())])

    def _group_of(self, vector: Tensor) -> Any:
        return self._hosts if vector.device.type == "cpu" else None

    def _disagree(self, what: str) -> NoReturn:
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


def current_ranks(sync: bool | Literal["lagged"]) -> OneProcess | ProcessGroup:
    """The processes to average over now: with ``sync`` those of the default group, else this one alone."""
    if not (sync and dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ONE_PROCESS
    return _group_of(dist.group.WORLD)


# By default group; that of now. A strong reference would keep a group alive that was destroyed, and with it threads at
# whose end the interpreter aborts.
_GROUPS: WeakKeyDictionary[Any, ProcessGroup] = WeakKeyDictionary()


def _group_of(world: Any) -> ProcessGroup:
    """The :class:`ProcessGroup` of a default group. A process may destroy its default group and start another."""
    if world not in _GROUPS:
        _GROUPS.clear()
        _GROUPS[world] = ProcessGroup()
    return _GROUPS[world]


def finish_exchanges() -> None:
    """Take in the sums that are under way, if there are any, without a word to another rank."""
    for group in list(_GROUPS.values()):
        group.finish()
