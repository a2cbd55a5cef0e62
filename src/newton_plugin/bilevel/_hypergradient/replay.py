"""Evaluate a loss again on the same sample: same dropout mask, same random numbers, buffers as they were.

A bilevel step evaluates each closure several times. Two things would then go wrong unnoticed:

* *Random numbers.* STORM subtracts the hypergradient of the *same sample* at the old point. The state of the
  generators (CPU, and the devices of the parameters) is saved before the first evaluation and restored before each
  later one. Afterwards the generators continue where the first evaluation left them.
* *Buffers.* A BatchNorm that sees one batch five times in a step would advance its running statistics five
  times. The first evaluation of a closure advances them, as in any training; later evaluations work on copies of
  the buffers, which are thrown away. A forward pre-hook on every module finds the modules, so the user does not list
  them. The buffers of TorchScript modules cannot be replaced; those modules are not covered.

A closure that draws from generator objects of its own, from ``random`` or from NumPy is not replayed: draw such
samples before the step, outside the closure.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = ["Replay"]


class RandomState:
    """The state of torch's default generators, on the CPU and on some devices, at one moment."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._others = [(d, _generator_access(d), _generator_access(d).get_rng_state(*_index(d))) for d in devices]

    def restore(self) -> None:
        torch.set_rng_state(self._cpu)
        for device, access, state in self._others:
            access.set_rng_state(state, *_index(device))


def _generator_access(device: torch.device) -> Any:
    return torch.get_device_module(device)


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)


class _Lender:
    """A forward pre-hook that gives modules copies of their buffers.

    It is an object and not a function, because torch.compile looks into closures.
    """

    def __init__(self) -> None:
        self.owned: dict[nn.Module, dict[str, Tensor | None]] = {}

    def __call__(self, module: nn.Module, _: Any) -> None:
        if torch.compiler.is_compiling() or module in self.owned:  # the compiled wrapper was called before
            return
        for inner in module.modules():
            if inner not in self.owned and inner._buffers and not isinstance(inner, torch.jit.ScriptModule):
                self.owned[inner] = dict(inner._buffers)
                inner._buffers.update({k: b if b is None else b.clone() for k, b in inner._buffers.items()})
        self.owned.setdefault(module, {})

    def give_back(self) -> None:
        for module, buffers in self.owned.items():
            module._buffers.update(buffers)


@contextmanager
def borrowed_buffers() -> Iterator[None]:
    """Inside, every module that is called works on copies of its buffers."""
    lender = _Lender()
    handle = register_module_forward_pre_hook(lender)
    try:
        with warnings.catch_warnings():
            # torch.compile warns that a global hook fires for its wrapper as well, which is intended here.
            warnings.filterwarnings("ignore", "Using `torch.compile.module.` when there are global hooks")
            yield
    finally:
        handle.remove()
        lender.give_back()


class Replay:
    """The samples of one step, each as it was when its closure was first evaluated."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        devices = dict.fromkeys(t.device for t in tensors)
        self._devices = [d for d in devices if d.type not in ("cpu", "meta")]
        self._states: dict[str, RandomState] = {}
        self._evaluated: set[str] = set()

    def forget(self) -> None:
        """Let the next evaluation of each closure be a first one again."""
        self._states.clear()
        self._evaluated.clear()

    def fresh(self, name: str, closure: Callable[[], Any]) -> Any:
        """Evaluate on a new sample, drawn from the generators as they are."""
        with borrowed_buffers() if name in self._evaluated else nullcontext():
            self._evaluated.add(name)
            return closure()

    def same(self, name: str, closure: Callable[[], Any]) -> Any:
        """Evaluate on the sample of the first call of this method, which draws a new one."""
        if name not in self._states:
            self._states[name] = RandomState(self._devices)
            return self.fresh(name, closure)
        now = RandomState(self._devices)
        self._states[name].restore()
        try:
            return self.fresh(name, closure)
        finally:
            now.restore()
