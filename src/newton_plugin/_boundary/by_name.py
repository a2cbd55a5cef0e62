"""Where outputs meet the loss, by name: what was recorded while the model and the loss were called."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from newton_plugin._boundary.autograd_graph import Edge, explore
from newton_plugin._boundary.finder import Cut, boundaries_at
from newton_plugin._errors import ArgumentError

__all__ = ["LossCall", "ModuleOutput"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors that require grad in nested tuples, lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        if value.requires_grad and value.is_floating_point() and value.ndim > 0:
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__") and not isinstance(value, type):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name))


class _Recorder:
    """Collects gradient edges by name during a forward pass."""

    # Edges keep their graph alive; a forward pass whose loss never comes must not do so for ever.
    _LIMIT = 256

    def __init__(self) -> None:
        self.recorded: dict[Edge, str] = {}

    def record(self, name: str, value: Any) -> None:
        if not torch.is_grad_enabled():
            return
        for tensor in tensors_in(value):
            edge = get_gradient_edge(tensor)
            self.recorded.setdefault((edge.node, edge.output_nr), name)
        while len(self.recorded) > self._LIMIT:
            self.recorded.pop(next(iter(self.recorded)))

    def cut(self, loss: Tensor) -> Cut:
        """The recorded edges that ``loss`` was computed from; forgets all of them."""
        recorded, self.recorded = self.recorded, {}
        assert loss.grad_fn is not None
        graph = explore(loss.grad_fn, recorded.__contains__)
        cut = boundaries_at({edge: recorded[edge] for edge in graph.stops}, graph)
        if recorded and not cut.boundaries:
            names = ", ".join(sorted({repr(n) for n in recorded.values()}))
            cut.seen += f"; outputs recorded from {names}, none of which the loss was computed from"
        elif not recorded:
            cut.seen += "; nothing recorded: the named part was not called since the last step"
        return cut


class _SubmoduleHook:
    """A forward hook that never travels with a copy of the module it sits on."""

    def __init__(self, finder: _Recorder, name: str) -> None:
        self.finder = finder
        self.name = name
        self._inputs: Any = ()

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inputs = _Recorder()
        self._inputs.record(self.name, (args, kwargs))

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 0:  # a loss: what went in is the boundary
            self.finder.recorded.update(self._inputs.recorded)
        else:
            self.finder.record(self.name, output)
        self._inputs = ()


class _Detachable:
    """A hook function that deep-copies and pickles as one that does nothing."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        self.function(*args)

    def __deepcopy__(self, memo: Any) -> Any:
        return _inert

    def __reduce__(self) -> Any:
        return _get_inert, ()


def _inert(*args: Any) -> None:
    """What is left of a hook in a copy."""


def _get_inert() -> Any:
    return _inert


class ModuleOutput:
    """What the submodule ``name`` returned; what it was called with, if it returned a loss.

    Raises:
        ArgumentError: on :meth:`attach`, if there is no such submodule.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._recorder = _Recorder()
        self._handles: list[Any] = []

    def attach(self, module: nn.Module) -> None:
        """Register two forward hooks on the submodule."""
        self.detach()
        target = dict(module.named_modules()).get(self.name)
        if target is None:
            raise ArgumentError(no_such_name(self.name, module))
        hook = _SubmoduleHook(self._recorder, self.name)
        self._handles = [
            target.register_forward_pre_hook(_Detachable(hook.before), with_kwargs=True),  # type: ignore[arg-type]
            target.register_forward_hook(_Detachable(hook.after), with_kwargs=True),  # type: ignore[arg-type]
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._recorder.recorded = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Forget what an earlier forward pass left, then let the hooks record."""
        self._recorder.recorded = {}
        yield

    def __call__(self, loss: Tensor) -> Cut:
        return self._recorder.cut(loss)


class LossCall:
    """What the loss ``name`` was called with, where it is a method of the module or a function of
    ``torch.nn.functional``. It listens inside :meth:`watch` only.

    Raises:
        ArgumentError: on :meth:`attach`, if ``name`` is neither.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._recorder = _Recorder()
        self._module: nn.Module | None = None

    def attach(self, module: nn.Module) -> None:
        """Remember the module whose method it is."""
        if not callable(getattr(module, self.name, None)) and not is_functional(self.name):
            raise ArgumentError(no_such_name(self.name, module))
        self._module = module

    def detach(self) -> None:
        """Forget it."""
        self._module = None
        self._recorder.recorded = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record the calls made inside."""
        self._recorder.recorded = {}
        with ExitStack() as stack:
            if self._module is not None and callable(getattr(self._module, self.name, None)):
                stack.enter_context(self._listening_method(self._module))
            else:
                stack.enter_context(_Listening(self.name, self._recorder))
            yield

    @contextmanager
    def _listening_method(self, module: nn.Module) -> Iterator[None]:
        own = module.__dict__
        before = {self.name: own[self.name]} if self.name in own else {}
        original = getattr(module, self.name)

        def listening(*args: Any, **kwargs: Any) -> Any:
            self._recorder.record(self.name, (args, kwargs))
            return original(*args, **kwargs)

        own[self.name] = listening
        try:
            yield
        finally:
            own.pop(self.name, None)
            own.update(before)

    def __call__(self, loss: Tensor) -> Cut:
        return self._recorder.cut(loss)


class _Listening(TorchFunctionMode):
    """Records the inputs of one function of ``torch.nn.functional``."""

    def __init__(self, name: str, recorder: _Recorder) -> None:
        super().__init__()
        self._function = getattr(F, name)
        self._name, self._recorder = name, recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self._function:
            self._recorder.record(self._name, (args, kwargs))
        return func(*args, **(kwargs or {}))


def is_functional(name: str) -> bool:
    """Whether ``name`` is a function of ``torch.nn.functional``."""
    return not name.startswith("_") and inspect.isroutine(getattr(F, name, None))


def no_such_name(name: str, module: nn.Module) -> str:
    """A message that lists what could have been meant."""
    names = [n for n, _ in module.named_modules() if n]
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    near = difflib.get_close_matches(name, names, 1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"boundary={name!r} names neither a submodule nor a method of {type(module).__name__}, nor a function of "
        f"torch.nn.functional.{meant} Its submodules: {shown or 'none'}. boundary='auto' needs no name."
    )
