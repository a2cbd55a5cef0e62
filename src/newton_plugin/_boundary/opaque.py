"""Operations whose insides the autograd graph does not show: do they hold parameters?"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from newton_plugin._boundary.autograd_graph import children, is_leaf, operation

__all__ = ["SCRIPTED", "hidden_parameters", "hides_parameters", "is_scripted"]

SCRIPTED = "DifferentiableGraph"


def hides_parameters(node: Node) -> bool:
    """Whether a Python ``autograd.Function`` holds parameters that are not its inputs: a reentrant checkpoint, say."""
    return isinstance(node, BackwardCFunction) and next(hidden_parameters(node), None) is not None


def hidden_parameters(node: Node) -> Iterator[Tensor]:
    """The parameters that a Python ``autograd.Function`` holds and that are not its inputs."""
    if not isinstance(node, BackwardCFunction) or _is_ours(node):
        return
    shown = {id(child.variable) for child, _ in children(node) if is_leaf(child)}  # type: ignore[attr-defined]
    yield from (held for held in _parameters_in(list(vars(node).values())) if id(held) not in shown)


def _is_ours(node: Node) -> bool:
    """Whether the Function is one of this package: an algorithm of a loss, which holds no parameters."""
    return getattr(node, "_forward_cls").__module__.partition(".")[0] == "newton_plugin"  # noqa: B009 - no type stubs


def _parameters_in(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """The parameters that an attribute of a Function leads to: of a module, in a list, in what a function refers to."""
    if isinstance(value, nn.Parameter):
        if value.requires_grad:
            yield value
    elif isinstance(value, nn.Module):
        yield from (p for p in value.parameters() if p.requires_grad)
    elif depth and isinstance(value, (list, tuple)):
        for item in value:
            yield from _parameters_in(item, depth - 1)
    elif depth and isinstance(value, Mapping):
        yield from _parameters_in(list(value.values()), depth - 1)
    elif depth and isinstance(value, functools.partial):
        yield from _parameters_in([value.func, *value.args, *value.keywords.values()], depth - 1)
    elif depth and inspect.ismethod(value):
        yield from _parameters_in([value.__self__, value.__func__], depth - 1)
    elif depth and inspect.isfunction(value):
        try:
            names = inspect.getclosurevars(value)
        except ValueError:  # it refers to a variable that has no value yet
            return
        yield from _parameters_in([*names.nonlocals.values(), *names.globals.values()], depth - 1)


def is_scripted(node: Node) -> bool:
    """Whether torch.jit has made one operation of what it applies parameters to."""
    return operation(node) == SCRIPTED and any(is_leaf(child) for child, _ in children(node))
