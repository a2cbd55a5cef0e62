"""The loss of a training_step as a function of outputs: a submodule returns what it is told, the rest runs as written.

What lies below the outputs is not computed again: the outermost module that returns the very tensor of the submodule
is the one that is replaced.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LossOfOutputs", "NotAFunction"]


class NotAFunction(Exception):
    """The loss cannot be had as a function of these outputs; the message says why. Caught inside this package."""


class LossOfOutputs:
    """``loss_of(outputs, batch)``, at the outputs of one submodule.

    Args:
        module: a LightningModule that nobody else needs: methods of it are replaced while the loss is computed.
        name: of the submodule.
        shape: of the outputs as the loss sees them; the submodule's may be a view of that.
        batch, batch_idx: of training.

    Attributes:
        outputs: the submodule's at this batch, in ``shape``.

    Raises:
        NotAFunction: there is no such submodule, it is called twice or not at all, or the training is a manual one.
    """

    def __init__(self, module: Any, name: str, shape: tuple[int, ...], batch: Any, batch_idx: int) -> None:
        self._module, self._batch_idx = module, batch_idx
        self.__qualname__ = "training_step"  # the name in a report
        takes = inspect.signature(module.training_step).parameters.values()
        self._takes_index = len(takes) > 1 or any(p.kind is p.VAR_POSITIONAL for p in takes)
        if not module.automatic_optimization:
            raise NotAFunction("in manual optimization training_step takes the steps itself")
        modules = dict(module.named_modules())
        if name not in modules:
            raise NotAFunction(f"{name!r} is no submodule, whose output could be replaced")
        parts = name.split(".")
        chain = [modules[".".join(parts[:k])] for k in range(len(parts) + 1)] if name else [module]
        with _recorded(chain) as calls, torch.no_grad():
            self._try(batch)
        if len(calls[-1]) != 1:
            raise NotAFunction(f"{name!r} is called {len(calls[-1])} times for one loss")
        made = calls[-1][0]
        if not isinstance(made, Tensor) or made.numel() != torch.Size(shape).numel():
            raise NotAFunction(f"what {name!r} returns is not what the loss sees, of shape {tuple(shape)}")
        self._replaced = next(m for m, seen in zip(chain, calls, strict=True) if len(seen) == 1 and seen[0] is made)
        self._own_shape = made.shape
        self.outputs = made.detach().reshape(shape)

    def __call__(self, outputs: Tensor, batch: Any) -> Tensor:
        """The loss where the submodule returns these outputs."""
        own = outputs.reshape(-1, *self._own_shape[1:])
        with _shadowed(self._replaced, forward=lambda *args, **kwargs: own):
            return self._run(batch)

    def _try(self, batch: Any) -> None:
        try:
            self._run(batch)
        except Exception as error:
            line = str(error).strip().partition("\n")[0]
            raise NotAFunction(f"training_step called again raised {type(error).__name__}: {line}") from error

    def _run(self, batch: Any) -> Tensor:
        quiet: dict[str, Callable[..., None]] = {name: lambda *args, **kwargs: None for name in ("log", "log_dict")}
        with _shadowed(self._module, **quiet):
            found = self._module.training_step(*((batch, self._batch_idx) if self._takes_index else (batch,)))
        return found["loss"] if isinstance(found, Mapping) else found


@contextmanager
def _recorded(modules: list[nn.Module]) -> Iterator[list[list[Any]]]:
    """Inside, what each of these modules returns, call by call."""
    calls: list[list[Any]] = [[] for _ in modules]
    hooks = [
        module.register_forward_hook(lambda m, args, made, seen=seen: seen.append(made))
        for module, seen in zip(modules, calls, strict=True)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _shadowed(module: nn.Module, **methods: Any) -> Iterator[None]:
    """Inside, these methods stand in front of the module's own."""
    attributes = vars(module)
    before = {name: attributes[name] for name in methods if name in attributes}
    attributes.update(methods)
    try:
        yield
    finally:
        for name in methods:
            del attributes[name]
        attributes.update(before)
