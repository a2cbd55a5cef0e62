"""A callback that multiplies the learning rate, whatever the module's optimizers and schedulers are.

Schedulers compute learning rates in many ways, so scaling what they start from would need to know each of them. Instead
every rate is multiplied where an optimizer's ``step`` begins and put back where it ends: the user's whole schedule,
times a factor, in automatic and manual optimization. Code that runs inside the step (the closure, with
``training_step``) sees and sets the user's own rates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from typing_extensions import override

from newton_plugin_lightning._bases import CallbackBase
from newton_plugin_lightning._compare.errors import ComparisonError

__all__ = ["MultiplyRate", "rates_of"]


class MultiplyRate(CallbackBase):
    """Trains with ``factor`` times the learning rates of all optimizers.

    Attributes:
        learning_rates: what the fit began with, the factor included.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.learning_rates: list[float] = []
        self._handles: list[Any] = []

    @override
    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Hook every optimizer."""
        self.learning_rates = [rate * self.factor for rate in rates_of(trainer.optimizers)]
        if self.factor == 1:
            return
        for optimizer in trainer.optimizers:
            if any("lr" not in group for group in optimizer.param_groups):
                raise ComparisonError(
                    f"{type(optimizer).__name__} has a parameter group without 'lr', so its learning rate cannot be "
                    "multiplied. Compare at your own rate alone: --rates 1."
                )
            scaled = _Scaled(optimizer, self.factor)
            self._handles.append(optimizer.register_step_pre_hook(scaled.before))
            self._handles.append(optimizer.register_step_post_hook(scaled.after))

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def rates_of(optimizers: list[Optimizer]) -> list[float]:
    """The different learning rates that the user gave, ascending; below a scheduler what it starts from or rises to."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    given = [group.get("max_lr", group.get("initial_lr", group.get("lr"))) for group in groups]
    return sorted({float(rate) for rate in given if rate is not None})


class _Scaled:
    """The rates of one optimizer, multiplied while it steps and not while its closure runs."""

    def __init__(self, optimizer: Optimizer, factor: float) -> None:
        self.groups, self.factor = optimizer.param_groups, factor
        self.own: list[Any] = []
        self.depth = 0  # a subclass whose step calls the step of its base runs the hooks twice

    def multiply(self) -> None:
        self.own = [group["lr"] for group in self.groups]
        for group in self.groups:
            group["lr"] = group["lr"] * self.factor

    def put_back(self) -> None:
        for group, rate in zip(self.groups, self.own, strict=True):
            group["lr"] = rate

    def before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.depth += 1
        if self.depth > 1:
            return None
        self.groups = optimizer.param_groups  # a checkpoint that was loaded has replaced them
        self.multiply()
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self.unscaled(kwargs["closure"])}
        if len(args) > 1 and callable(args[1]):  # args[0] is the optimizer
            return (args[0], self.unscaled(args[1]), *args[2:]), kwargs
        return None

    def unscaled(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            self.put_back()
            value = closure()
            self.multiply()
            return value

        return run

    def after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.put_back()
