"""Trains runs in this process, or in several of their own, and yields the outcomes as they come.

Processes are spawned, each with one thread. Each talks to this one through a pipe: when this process dies, by whatever
means, the pipe closes and they end too. They may have children (loaders with workers), so they are no daemons.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import pickle
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from newton_plugin import ArgumentError
from newton_plugin_lightning._compare.errors import ComparisonError
from newton_plugin_lightning._compare.lines import Line
from newton_plugin_lightning._compare.one_run import Outcome, Task, quiet_options, train
from newton_plugin_lightning._compare.plan import Run

__all__ = ["outcomes"]

_READY = "ready"
_PATIENCE = 5  # seconds that a process has for its own end


def outcomes(task: Task, runs: Sequence[Run], metric: str, workers: int, checkpoints: str | None) -> Iterator[Outcome]:
    """The outcomes of ``runs``, in any order.

    Raises:
        ArgumentError: the task cannot be sent to another process.
        ComparisonError: a process could not be started.
    """
    if workers == 1 or len(runs) < 2:
        for run in runs:
            yield train(task, run, metric, _options(run, 0, checkpoints))
        return
    try:
        pickle.dumps(task)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ArgumentError(
            f"with workers={workers} the functions are sent to other processes, and these cannot be: {error}. "
            "Define them at the top of a module, or take workers=1."
        ) from error
    yield from _in_processes(task, runs, metric, min(workers, len(runs)), checkpoints)


def _in_processes(
    task: Task, runs: Sequence[Run], metric: str, workers: int, checkpoints: str | None
) -> Iterator[Outcome]:
    waiting, died = list(reversed(runs)), set()
    busy: dict[Any, _Worker] = {}
    try:
        for number in range(workers):
            worker = _Worker(number, task, metric, checkpoints)
            busy[worker.connection] = worker
        while busy:
            for connection in wait(list(busy)):
                worker = busy[connection]
                try:
                    received = worker.connection.recv()
                except (EOFError, OSError):  # killed, for want of memory perhaps
                    del busy[connection]
                    code, lost = worker.end(), worker.run
                    if lost is None:
                        raise ComparisonError(
                            f"a process for training could not be started (exit code {code}; its message is above). "
                            'In a script, call compare below `if __name__ == "__main__":`.'
                        ) from None
                    if lost.key in died:  # a second time
                        yield Outcome(_lost(lost, code))
                    else:
                        died.add(lost.key)
                        waiting.append(lost)
                    worker = _Worker(worker.number, task, metric, checkpoints)
                    busy[worker.connection] = worker
                    continue
                if received != _READY:
                    yield received
                if waiting:
                    worker.start(waiting.pop())
                else:
                    del busy[connection]
                    worker.end()
    finally:
        for worker in busy.values():
            worker.stop()


class _Worker:
    """A process and our end of its pipe."""

    def __init__(self, number: int, task: Task, metric: str, checkpoints: str | None) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.number = number
        self.run: Run | None = None
        self.process = spawn.Process(target=_serve, args=(theirs, number, task, metric, checkpoints))
        self.process.start()
        theirs.close()  # or a dead process would not close the pipe

    def start(self, run: Run) -> None:
        self.run = run
        with contextlib.suppress(OSError):  # it has just died, which the open end of the pipe will say
            self.connection.send(run)

    def end(self) -> int | None:
        self.connection.close()
        self.process.join()
        return self.process.exitcode

    def stop(self) -> None:
        self.process.terminate()
        self.process.join(_PATIENCE)
        self.process.kill()
        self.end()


def _serve(connection: Connection, number: int, task: Task, metric: str, checkpoints: str | None) -> None:
    """Train what comes through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    try:
        connection.send(_READY)
        while True:
            run: Run = connection.recv()
            connection.send(train(task, run, metric, _options(run, number, checkpoints)))
    except (EOFError, OSError):
        return


def _options(run: Run, number: int, checkpoints: str | None) -> dict[str, Any]:
    folder = None if checkpoints is None else f"{checkpoints}/seed{run.seed}_{run.arm.name}_{run.rate:.4g}"
    return quiet_options(number, folder)


def _lost(run: Run, code: int | None) -> Line:
    return Line(run.seed, run.arm.name, run.rate, None, f"its process died twice (exit code {code})", [], [], [])
