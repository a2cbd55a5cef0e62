"""Keeping the step out of regions that ``torch.compile`` compiles.

The step differentiates the loss's graph, which a compiled region does not have: inside, a second derivative is an
error or, in some versions, silently zero. A call of a function that is marked :func:`eager` is a graph break: the
compiler stops before the call, the function runs eagerly with everything it calls, and the compiler goes on after it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

__all__ = ["eager", "untraced"]

Function = TypeVar("Function", bound=Callable[..., Any])
FunctionClass = TypeVar("FunctionClass", bound=type[torch.autograd.Function])

_METHODS = ("forward", "setup_context", "backward", "jvp", "vmap")
_disabled: Any = None  # one for all functions: the compiler compiles :func:`eager` anew for each, up to eight times
# What torch.compiler.disable is made of. Untyped.
_set_compiler: Any = getattr(torch._C, "_dynamo").eval_frame.set_eval_frame  # noqa: B009


def eager(function: Function) -> Function:
    """A decorator that keeps the compiler out of a function and of all that it calls: ``torch.compiler.disable``.

    It is applied at the first call from a compiled function. Applied at once it would import the compiler together with
    this package, which takes longer than importing torch.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            global _disabled
            if _disabled is None:
                _disabled = torch.compiler.disable(_call)
            return _disabled(function, args, kwargs)
        # The compiler may have given up on this frame alone. It would then compile what is called from here.
        before = _set_compiler(None)
        try:
            return function(*args, **kwargs)
        finally:
            _set_compiler(before)

    return wrapper  # type: ignore[return-value]


def _call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return function(*args, **kwargs)


def untraced(function_class: FunctionClass) -> FunctionClass:
    """A decorator for autograd Functions: ``apply`` is a graph break, and the compiler sees none of their methods.

    Where no input asks for a gradient, the compiler (torch 2.6 to 2.13) follows ``forward`` itself. It guesses from the
    number of arguments whether the first one is ``ctx``, and for a ``forward`` that ends in ``*rest`` the guess is
    wrong: every argument moves by one place, silently. It stops before a ``forward`` that is not a plain function.
    """
    ours = {name: getattr(function_class, name) for name in _METHODS}
    ours = {name: method for name, method in ours.items() if method is not getattr(torch.autograd.Function, name)}

    @eager
    def forward(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return ours["forward"](*args)
        for name, method in ours.items():  # from now on
            setattr(function_class, name, staticmethod(functools.partial(torch.compiler.disable(method))))
        return function_class.forward(*args)

    setattr(function_class, "forward", staticmethod(functools.partial(forward)))  # noqa: B010 - of no such type
    return function_class
