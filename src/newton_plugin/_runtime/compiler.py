"""Keeping the step out of regions that ``torch.compile`` compiles.

The step differentiates the loss's graph, which a compiled region does not have: inside, a second derivative is an
error or, in some versions, silently zero. A call of a function that is marked :func:`eager` is a graph break: the
compiler stops before the call, the function runs eagerly with everything it calls, and the compiler goes on after it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["eager"]

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """A decorator: ``torch.compiler.disable``, applied at the first call from a compiled function.

    Applied at once it would import the compiler together with this package, which takes longer than importing torch.
    """
    disabled: list[Any] = []

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return wrapper  # type: ignore[return-value]
