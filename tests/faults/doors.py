"""The same few training steps through each door of the package, and what came of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from tests.lightning.fits import Batches, plain_module, trainer
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin_lightning import NewtonLosses

DOORS = ("newton_loss", "LossHook", "NewtonLosses")

Loss = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]


@dataclass
class Outcome:
    """The result of a run.

    Attributes:
        model: what was trained.
        values: of the loss, at each step.
        gradients: of all parameters together, after each step's backward.
        warnings: those of the package.
        error: the exception that ended the run; None if none did.
        fallbacks: as ``diagnostics()`` counts them.
        left_over: names that the callback left in the Lightning module.
    """

    model: nn.Module
    values: list[float] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: Exception | None = None
    fallbacks: float = 0.0
    left_over: list[str] = field(default_factory=list)


def run(door: str, model: nn.Module, loss: Loss, batches: Sequence[Batch], **options: Any) -> Outcome:
    """Run backward passes through a door, without optimizer steps between them; "plain" is without the package."""
    outcome = Outcome(model)
    steps = {"newton_loss": _wrapped, "LossHook": _hooked, "NewtonLosses": _fitted, "plain": _plain}[door]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            steps(outcome, model, loss, batches, options)
        except Exception as error:
            outcome.error = error
    outcome.warnings = [str(w.message) for w in caught if str(w.message).startswith("newton_plugin")]
    return outcome


def flat_gradient(model: nn.Module) -> Tensor:
    """The gradients of all parameters that have one, in one vector."""
    return torch.cat([torch.zeros(0), *(p.grad.flatten() for p in model.parameters() if p.grad is not None)])


def _loop(outcome: Outcome, model: nn.Module, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """The outputs and targets of each batch; after each, the parameters' gradients are recorded."""
    for x, t in batches:
        model.zero_grad()
        yield model(x), t
        outcome.gradients.append(flat_gradient(model))


def _backward(outcome: Outcome, value: Tensor) -> None:
    outcome.values.append(float(value.detach()))
    value.backward()


def _plain(outcome: Outcome, model: nn.Module, loss: Loss, batches: Sequence[Batch], options: dict[str, Any]) -> None:
    for y, t in _loop(outcome, model, batches):
        _backward(outcome, loss(y, t))


def _wrapped(outcome: Outcome, model: nn.Module, loss: Loss, batches: Sequence[Batch], options: dict[str, Any]) -> None:
    wrapped = npl.newton_loss(loss, **options)
    for y, t in _loop(outcome, model, batches):
        _backward(outcome, wrapped(y, t))
    outcome.fallbacks = wrapped.diagnostics().get("fallbacks", 0.0)


def _hooked(outcome: Outcome, model: nn.Module, loss: Loss, batches: Sequence[Batch], options: dict[str, Any]) -> None:
    hook = npl.LossHook(module=model, **options)
    for y, t in _loop(outcome, model, batches):
        _backward(outcome, hook(loss(y, t)))
    outcome.fallbacks = hook.diagnostics().get("fallbacks", 0.0)


def _fitted(outcome: Outcome, model: nn.Module, loss: Loss, batches: Sequence[Batch], options: dict[str, Any]) -> None:
    if options.get("boundary", "auto") != "auto":
        options = {**options, "boundary": f"model.{options['boundary']}"}

    def optimizer_step(self: Any, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        outcome.gradients.append(flat_gradient(model))

    callback = NewtonLosses(**options)
    module = plain_module(pl, model, lambda net, batch: loss(net(batch[0]), batch[1]), optimizer_step=optimizer_step)
    try:
        trainer(pl, callback).fit(module, Batches(batches))
    finally:
        outcome.values = module.losses
        outcome.left_over = [n for n in ("training_step", "manual_backward", "__getstate__") if n in vars(module)]
        outcome.fallbacks = callback.hook.diagnostics().get("fallbacks", 0.0)
