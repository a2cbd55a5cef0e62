"""A case, and the record of what it did."""

from __future__ import annotations

import copy
import logging
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.versions.plain import plain

__all__ = ["Case", "Record"]


class _Messages(logging.Handler):
    """Collects what a logger is told."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(f"{record.levelname}: {record.getMessage()}")


class Record:
    """What a case did: values, errors, warnings and log messages, by name.

    Args:
        loaded: the running state that another version saved at the half of this case. None: its own state is used.

    Attributes:
        entries: what came out, as plain data.
        state: the running state at the half of the case; None if the case has none.
    """

    def __init__(self, loaded: Any = None) -> None:
        self.entries: dict[str, Any] = {}
        self.state: Any = None
        self._loaded = loaded

    def put(self, name: str, value: Any) -> None:
        """Store a value."""
        self.entries[name] = plain(value)

    def hand_over(self, state: Any) -> Any:
        """Store the running state of the first half; return the state with which the second half begins."""
        self.state = copy.deepcopy(state)  # counters are changed in place
        self.put("state", state)
        return state if self._loaded is None else self._loaded

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Make an error, the warnings and the log messages of the block part of the record."""
        logger, handler = logging.getLogger("newton_plugin"), _Messages()
        logger.addHandler(handler)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    yield
                except Exception as error:
                    kinds = " < ".join(k.__name__ for k in type(error).__mro__[:-2])
                    self.put(f"{name}, error", f"{kinds}: {error}")
        finally:
            logger.removeHandler(handler)
        for k, warning in enumerate(caught):
            self.put(f"{name}, warning {k}", f"{warning.category.__name__}: {warning.message}")
        for k, message in enumerate(handler.seen):
            self.put(f"{name}, log {k}", message)


@dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        group: the row of the table that counts it.
        name: all of its settings; no two cases of a group share one.
        body: runs it and fills the record.
    """

    group: str
    name: str
    body: Callable[[Record], None]

    @property
    def key(self) -> str:
        """Group and name."""
        return f"{self.group}: {self.name}"

    def run(self, loaded: Any = None) -> Record:
        """The record of the case, from a random state of its own."""
        record = Record(loaded)
        torch.manual_seed(zlib.crc32(self.key.encode()))
        with record.attempt("case"):
            self.body(record)
        return record
