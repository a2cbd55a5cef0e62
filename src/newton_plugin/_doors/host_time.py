"""How long the host works on a step: at once inside the hook, or in the backward pass.

Nobody waits for the device. On a CPU this is the time that a step takes; on an accelerator it is the time to launch it,
which hides behind the device's own work as long as that takes longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from newton_plugin._boundary.autograd_graph import Boundary
from newton_plugin._curvature.protocol import Curvature

__all__ = ["HessianCost", "HostTime", "dear_hessian"]

now = time.perf_counter  # a name of this module: tests put a clock of their own there

_WARM_UP = 3  # calls: layers are found, kernels are chosen, much is compiled
_WINDOW = 20  # calls
_WINDOWS = 5  # in which somebody looks, at the beginning of a training
_DEAR = 5.0  # times the rest of a step
_NOTICED = 0.01  # seconds: below, nobody waits for it


class HostTime:
    """Seconds of the host for one hooked loss; complete once its backward pass has run.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._began = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside."""
        began = now()
        try:
            yield
        finally:
            self.seconds += now() - began

    @contextmanager
    def around_hooks(self, boundaries: Sequence[Boundary]) -> Iterator[None]:
        """Also count the hooks that are registered inside, on the operations that use the outputs.

        Hooks of an operation run in the order in which they were registered: one before and one after do it.
        """
        nodes = list({id(node): node for boundary in boundaries for node, _ in boundary.consumers}.values())
        for node in nodes:
            node.register_hook(self._begin())
        yield
        for node in nodes:
            node.register_hook(self._end())

    def _begin(self) -> Callable[[Any, Any], None]:
        def begin(grad_inputs: Any, grad_outputs: Any) -> None:
            self._began = now()

        return begin

    def _end(self) -> Callable[[Any, Any], None]:
        def end(grad_inputs: Any, grad_outputs: Any) -> None:
            self.seconds += now() - self._began

        return end


class HessianCost:
    """Does a Hessian take many times the rest of a training step? Asked at the first hundred calls of a hook.

    What lies between two calls, the backward pass, the optimizer, the data and the forward pass, is that rest.

    Attributes:
        dear: seconds inside and outside of a call, on average over twenty, where inside is dear; else None.
    """

    def __init__(self) -> None:
        self.dear: tuple[float, float] | None = None
        self._calls = 0
        self._since = self._inside = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Around a call."""
        entered = now()
        calls = self._calls - _WARM_UP
        self.dear = None
        if 0 <= calls <= _WINDOW * _WINDOWS and calls % _WINDOW == 0:
            inside, rest = self._inside, entered - self._since - self._inside
            self._since, self._inside = entered, 0.0
            if calls and inside >= max(_DEAR * rest, _NOTICED * _WINDOW):
                self.dear = inside / _WINDOW, rest / _WINDOW
        yield
        self._calls += 1
        self._inside += now() - entered


def dear_hessian(curvature: Curvature, inside: float, rest: float) -> str:
    """What is to be said of a Hessian that takes so many seconds of the host, beside those of the rest of a step."""
    every, structure = curvature.refresh_every, curvature.structure
    if structure == "per_sample":
        remedy = f"Leave out structure={structure!r}, whose matrices are new with every sample, and take "
    else:
        remedy = "Take "
    return (
        f"newton_plugin: {curvature!r} takes {inside / max(rest, 1e-9):.0f} times the rest of a training step "
        f"({1e3 * inside:.0f} ms beside {1e3 * rest:.0f} ms of the host). {remedy}"
        f"curvature=npl.Hessian(refresh_every={10 * every}), which differentiates the loss twice at every "
        f"{10 * every}th step alone, or curvature='fisher', which needs no second derivative."
    )
