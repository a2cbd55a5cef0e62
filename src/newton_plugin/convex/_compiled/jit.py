"""``numba.njit`` as all compiled code here uses it, with a cache on disk that notices every change of that code."""

from __future__ import annotations

import functools
import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import event

__all__ = ["array_subroutine", "kernel", "source_sum", "subroutine"]

_numba: Any = numba  # it has no types
_njit = _numba.njit
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
_PART: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}

# numba's option to count no references. numba uses it in its own code but does not document it: without it the results
# are the same and small problems take longer.
_known: Any = getattr(getattr(_numba.core, "options", None), "DefaultOptions", None)
_BORROWED = {"_nrt": False} if hasattr(_known, "_nrt") else {}

_LOGGER = logging.getLogger("newton_plugin")


class _Announcement(event.Listener):
    """Says once, before it begins, that code is being compiled and not loaded from disk."""

    said = False

    def on_start(self, event: Any) -> None:
        if not _Announcement.said:
            _Announcement.said = True
            # A log message and not a warning: whether it comes depends on the machine, and warnings may be errors.
            _LOGGER.warning(
                "newton_plugin compiles its QP solver now, which takes some twenty seconds of one core. numba keeps "
                "the machine code on disk, so it happens once for each version and kind of CPU. docs/convex.md says "
                "how to do it beforehand; solver='torch' needs no compiling."
            )

    def on_end(self, event: Any) -> None:
        pass


def kernel(signature: str) -> Callable[[Any], Any]:
    """A function that Python calls: compiled when it is defined, its machine code kept on disk.

    numba looks only at the file of a function whose code it has kept, not at the files of the functions it calls.
    Therefore the name under which the code is kept carries a checksum of all files in this folder.
    """

    def compiled(function: Any) -> Any:
        function.__qualname__ += f"_{source_sum(Path(__file__).parent):08x}"
        with event.install_listener("numba:compile", _Announcement()):
            return _njit(signature, cache=True, **_OPTIONS)(function)

    return compiled


def subroutine(function: Any) -> Any:
    """A function that kernels call, compiled as a part of them. It allocates nothing and returns no array to a kernel.

    It borrows its arrays without counting references: counting took a third of the time of a small problem (1.5 of
    4.5 us at n = 10), as every NamedTuple of arrays counts each of them.
    """
    return _njit(**_PART, **_BORROWED, **_OPTIONS)(function)


def array_subroutine(function: Any) -> Any:
    """A subroutine that returns arrays to a kernel, with references counted."""
    return _njit(**_PART, **_OPTIONS)(function)


@functools.cache
def source_sum(folder: Path) -> int:
    """A checksum of the Python files in a folder."""
    return zlib.crc32(b"".join(file.read_bytes() for file in sorted(folder.glob("*.py"))))
