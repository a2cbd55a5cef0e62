"""Keeping the step out of regions that ``torch.compile`` compiles.

The step differentiates the loss's graph, which a compiled region does not have: inside, a second derivative is an
error or, in some versions, silently zero. Called from a compiled function, what is marked here is a graph break: the
compiler stops before it, it runs eagerly together with everything it calls, and the compiler goes on after it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["eager"]

Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """A decorator; ``torch.compiler.disable``, but applied when the compiler first comes by.

    At once it would import the compiler with this package, which takes longer than importing torch.
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
