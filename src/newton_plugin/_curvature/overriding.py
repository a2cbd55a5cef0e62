"""What a base class says of a method holds for that method, and not for another one that takes its place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

__all__ = ["arguments_of", "holds"]


def holds(cls: type, statement: str, method: str) -> bool:
    """Whether the attribute ``statement`` of a class is stated no further up than ``method`` is defined."""

    def distance(name: str) -> int:
        return next(k for k, base in enumerate(cls.__mro__) if name in base.__dict__)

    return distance(statement) <= distance(method)


def arguments_of(method: Callable[..., Any]) -> frozenset[str]:
    """The names of its arguments; none if it is not written in Python."""
    try:
        return frozenset(inspect.signature(method, follow_wrapped=False).parameters)
    except (TypeError, ValueError):
        return frozenset()
