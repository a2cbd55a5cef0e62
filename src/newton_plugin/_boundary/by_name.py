"""``boundary="head"``: where outputs meet the loss, by a name.

A name is that of a submodule (:class:`ModuleOutput`) or that of a loss (:class:`LossCall`). Forward hooks and wrapped
calls record the tensors that pass there; under a loss, the recorded tensors that it was computed from are its outputs.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from newton_plugin._boundary.autograd_graph import Edge, edge_of, explore
from newton_plugin._boundary.finder import Cut, Part, boundaries_at
from newton_plugin._errors import ArgumentError

__all__ = ["LossCall", "ModuleOutput"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors that require grad in nested tuples, lists, dicts and dataclasses; none without dimensions."""
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
    """Records the edges of tensors, with a name for each, during a forward pass."""

    # An edge keeps its graph alive. If no loss ever asks for the edges of a forward pass, the oldest are given up.
    _LIMIT = 256

    def __init__(self) -> None:
        self.recorded: dict[Edge, Part] = {}

    def record(self, name: str, value: Any) -> None:
        """Record the tensors in ``value``, what one call returned or was given, under ``name``."""
        if not torch.is_grad_enabled():
            return
        for place, tensor in enumerate(tensors_in(value)):
            self.recorded.setdefault(edge_of(tensor), Part(name, frozenset([(name, place)])))
        while len(self.recorded) > self._LIMIT:
            self.recorded.pop(next(iter(self.recorded)))

    def cut(self, loss: Tensor) -> Cut:
        """The boundaries at the recorded edges that ``loss`` was computed from; all edges are forgotten."""
        recorded, self.recorded = self.recorded, {}
        assert loss.grad_fn is not None
        graph = explore(loss.grad_fn, recorded.__contains__)
        cut = boundaries_at({edge: recorded[edge] for edge in graph.stops}, graph)
        if recorded and not cut.boundaries:
            names = ", ".join(sorted({repr(part.name) for part in recorded.values()}))
            cut.description += f"; outputs recorded from {names}, none of which the loss was computed from"
        elif not recorded:
            cut.description += "; nothing recorded: the named part was not called since the last step"
        return cut


class _SubmoduleHooks:
    """The two forward hooks of one submodule: they record its output, or its inputs if it is a loss."""

    def __init__(self, recorder: _Recorder, name: str) -> None:
        self.recorder = recorder
        self.name = name
        self._inputs = _Recorder()

    def before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inputs = _Recorder()
        self._inputs.record(self.name, (args, kwargs))

    def after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 0:  # the submodule is a loss: its inputs are the outputs
            self.recorder.recorded.update(self._inputs.recorded)
        else:
            self.recorder.record(self.name, output)
        self._inputs = _Recorder()


class _NotCopied:
    """A hook function that does nothing in a copy of its module, deep-copied or unpickled."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        self.function(*args)

    def __deepcopy__(self, memo: Any) -> Any:
        return _do_nothing

    def __reduce__(self) -> Any:
        return _get_do_nothing, ()


def _do_nothing(*args: Any) -> None:
    """The hook in a copy."""


def _get_do_nothing() -> Any:
    return _do_nothing


class ModuleOutput:
    """Finds what the submodule ``name`` returned or, if it returned a loss, what it was called with.

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
        hooks = _SubmoduleHooks(self._recorder, self.name)
        self._handles = [
            target.register_forward_pre_hook(_NotCopied(hooks.before_forward), with_kwargs=True),  # type: ignore[arg-type]
            target.register_forward_hook(_NotCopied(hooks.after_forward), with_kwargs=True),  # type: ignore[arg-type]
        ]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._recorder.recorded = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Forget what an earlier forward pass recorded. The hooks record inside and outside."""
        self._recorder.recorded = {}
        yield

    def __call__(self, loss: Tensor) -> Cut:
        return self._recorder.cut(loss)


class LossCall:
    """Finds what the loss ``name`` was called with: a method of the module, or a function of ``torch.nn.functional``.

    Calls are recorded inside :meth:`watch` only.

    Raises:
        ArgumentError: on :meth:`attach`, if ``name`` is neither.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._recorder = _Recorder()
        self._module: nn.Module | None = None

    def attach(self, module: nn.Module) -> None:
        """Note the module whose method the loss may be."""
        if not callable(getattr(module, self.name, None)) and not is_functional(self.name):
            raise ArgumentError(no_such_name(self.name, module))
        self._module = module

    def detach(self) -> None:
        """Forget the module and what was recorded."""
        self._module = None
        self._recorder.recorded = {}

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record the calls made inside."""
        self._recorder.recorded = {}
        with ExitStack() as stack:
            if self._module is not None and callable(getattr(self._module, self.name, None)):
                stack.enter_context(self._record_method(self._module))
            else:
                stack.enter_context(_RecordFunction(self.name, self._recorder))
            yield

    @contextmanager
    def _record_method(self, module: nn.Module) -> Iterator[None]:
        """Inside, the method of this object records its arguments."""
        own = module.__dict__
        before = {self.name: own[self.name]} if self.name in own else {}
        original = getattr(module, self.name)

        def recording(*args: Any, **kwargs: Any) -> Any:
            self._recorder.record(self.name, (args, kwargs))
            return original(*args, **kwargs)

        own[self.name] = recording
        try:
            yield
        finally:
            own.pop(self.name, None)
            own.update(before)

    def __call__(self, loss: Tensor) -> Cut:
        return self._recorder.cut(loss)


class _RecordFunction(TorchFunctionMode):
    """Inside, one function of ``torch.nn.functional`` records its arguments."""

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
    """The message for a name that means nothing, with the names that could have been meant."""
    names = [n for n, _ in module.named_modules() if n]
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    near = difflib.get_close_matches(name, names, 1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    return (
        f"boundary={name!r} names neither a submodule nor a method of {type(module).__name__}, nor a function of "
        f"torch.nn.functional.{meant} Its submodules: {shown or 'none'}. boundary='auto' needs no name."
    )
