"""What is refused before it is allocated."""

from __future__ import annotations

from newton_plugin._errors import OutputsTooLargeError

__all__ = ["MAX_BYTES", "refuse_beyond"]

MAX_BYTES = 2 * 1024**3


def refuse_beyond(elements: int, asked: str, what: str, remedy: str) -> None:
    """Raise :class:`OutputsTooLargeError` if so many numbers in float64 take more than ``MAX_BYTES``.

    Args:
        elements: how many.
        asked: the arguments and sizes that lead there.
        what: what they are.
        remedy: what to do.
    """
    if 8 * elements > MAX_BYTES:
        raise OutputsTooLargeError(
            f"{asked} needs {what} of {8 * elements / 1024**3:.1f} GiB, more than the limit of "
            f"{MAX_BYTES / 1024**3:.0f} GiB. {remedy}"
        )
