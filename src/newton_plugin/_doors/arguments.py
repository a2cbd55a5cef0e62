"""The outputs among the arguments of a loss function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from newton_plugin._errors import ArgumentError, ArgumentTypeError, check_floating

__all__ = ["argument", "check_outputs", "loss_at", "name_of", "outputs_of", "replaced"]


def name_of(loss_fn: Callable[..., Any]) -> str:
    """What messages call a loss function."""
    return getattr(loss_fn, "__name__", type(loss_fn).__name__)


def argument(loss_fn: Callable[..., Any], which: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One argument of a call, by its position or its name.

    Raises:
        ArgumentError: the call has no such argument.
    """
    if isinstance(which, str) and which in kwargs:
        return kwargs[which]
    if isinstance(which, int) and which < len(args):
        return args[which]
    function = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
    try:
        names = list(inspect.signature(function).parameters)
        name = names[which] if isinstance(which, int) else which
        return kwargs[name] if name in kwargs else args[names.index(name)]
    except (IndexError, KeyError, TypeError, ValueError):
        given = f"{len(args)} positional arguments and {sorted(kwargs)}"
        raise ArgumentError(
            f"outputs={which!r} names no argument in this call of {name_of(loss_fn)}; it was given {given}."
        ) from None


def outputs_of(
    loss_fn: Callable[..., Any], outputs: Sequence[int | str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """The outputs of a call, by what they are called in ``outputs``.

    Raises:
        ArgumentError, ArgumentTypeError: no such argument; not a tensor of floating-point numbers.
    """
    named: dict[str, Tensor] = {}
    for which in outputs:
        y = argument(loss_fn, which, args, kwargs)
        check_floating(f"outputs={which!r} of {name_of(loss_fn)}", y)
        named[str(which)] = y
    return named


def check_outputs(outputs: Any) -> tuple[int | str, ...]:
    """``outputs`` as a tuple of positions and names."""
    listed: tuple[Any, ...] = (outputs,)
    if isinstance(outputs, Sequence) and not isinstance(outputs, str):
        listed = tuple(outputs)
    for which in listed:
        if isinstance(which, bool) or not isinstance(which, (int, str)):
            raise ArgumentTypeError(
                f"outputs must be a position, an argument's name, or several of them; got {outputs!r}."
            )
        if isinstance(which, int) and which < 0:
            raise ArgumentError(f"outputs must count from 0; got {outputs!r}.")
    if not listed:
        raise ArgumentError("outputs must name at least one argument; got none.")
    return listed


def replaced(args: Any, kwargs: Any, old: Tensor, new: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with ``new`` in the place of ``old``."""
    return tuple(new if a is old else a for a in args), {k: new if a is old else a for k, a in kwargs.items()}


def loss_at(
    loss_fn: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Mapping[str, Tensor]
) -> Callable[[Sequence[Tensor]], Tensor]:
    """A loss as a function of its outputs alone."""

    def loss_of(inner: Sequence[Tensor]) -> Tensor:
        given, by_name = args, kwargs
        for old, new in zip(outputs.values(), inner, strict=True):
            given, by_name = replaced(given, by_name, old, new)
        return loss_fn(*given, **by_name)

    return loss_of
