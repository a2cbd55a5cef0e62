"""look: what a few dozen plain steps of a training show, and what to take.

Everything happens in a copy: of the module, by a Trainer of its own. The user's stay as they were.
"""

from __future__ import annotations

import copy
import importlib
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch

from newton_plugin import ArgumentError, ArgumentTypeError
from newton_plugin.testing import Cost, LookReport, Watch, Watching
from newton_plugin_lightning._bases import TREES, CallbackBase
from newton_plugin_lightning._callback import NewtonLosses
from newton_plugin_lightning._look_loss import LossOfOutputs, NotAFunction
from newton_plugin_lightning._trees import tree_of
from newton_plugin_lightning._untouched import quiet, random_states_kept

__all__ = ["look"]

_WARM_UP = 3  # pairs of steps that are not timed: kernels are chosen, layers are found


class _Watching(NewtonLosses):
    """Of another name than the user's own: their states must not be mixed."""


class _Looking(CallbackBase):
    """First plain steps that are looked at, then pairs of steps, without the package and with it.

    Batches that make one optimizer step together count as one.

    Args:
        watching: takes the first steps, and changes nothing.
        hooked: takes every second step of those that are timed.
        steps, pairs: how many.
        options: for check_loss.
    """

    def __init__(self, watching: Any, hooked: Any, steps: int, pairs: int, options: dict[str, Any]) -> None:
        super().__init__()
        self.watch = Watch()
        self.optimizers: Sequence[Any] = ()
        self._watching, self._hooked, self._options = watching, hooked, options
        self._steps, self._timed = steps, 2 * (pairs + _WARM_UP) if pairs else 0
        self._times: dict[int, float] = {}
        self._batches, self._began = 0, 0.0
        self._last: tuple[Any, int] | None = None

    def cost(self) -> Cost | None:
        """Of a training step; None where the training ended before any was timed."""
        whole = [self._times[k] for k in range(2 * _WARM_UP, len(self._times) // 2 * 2)]
        pairs = list(zip(whole[::2], whole[1::2], strict=True))
        return Cost.of_pairs(pairs, "a training step", repr(self._hooked)) if pairs else None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Schedulers that wait for a validation have none here."""
        configs = trainer.strategy.lr_scheduler_configs
        trainer.strategy.lr_scheduler_configs = [c for c in configs if not c.reduce_on_plateau]
        self.optimizers = list(trainer.optimizers)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Say who takes this step."""
        step = self._batches // trainer.accumulate_grad_batches
        self._watching.enabled, self._hooked.enabled = step < self._steps, step >= self._steps
        self._hooked.hook.enabled = (step - self._steps) % 2 == 1
        self._began = _now(pl_module)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Keep what a plain step shows."""
        if self._watching.enabled:
            self.watch.add(self._watching.hook.boundaries, self._watching.hook.last_steps)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep how long it took; check the loss after the last plain step; stop after the last pair."""
        took, step = _now(pl_module) - self._began, self._batches // trainer.accumulate_grad_batches
        self._batches += 1
        if step >= self._steps:
            self._times[step - self._steps] = self._times.get(step - self._steps, 0.0) + took
        following = self._batches // trainer.accumulate_grad_batches
        self._last = (batch, batch_idx) if step < self._steps else None
        if step < self._steps <= following:
            self._check(pl_module)
        if following >= self._steps + self._timed:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The training was shorter than the steps that were asked for."""
        self._check(pl_module)

    def _check(self, module: Any) -> None:
        if self._last is None:
            return
        (batch, batch_idx), self._last = self._last, None
        self._watching.enabled = self._hooked.enabled = False
        for found in self.watch.boundaries:
            dims = tuple(d for d in range(len(found.shape)) if d not in found.sample_dims)
            told = None if found.sample_dims == (0,) else dims
            try:
                if told is not None and not (found.sample_dims and dims):
                    raise NotAFunction("the outputs have no dimension of samples, or none of features")
                loss_of = LossOfOutputs(module, found.name, found.shape, batch, batch_idx)
                self.watch.check(found.name, loss_of, loss_of.outputs, batch, feature_dims=told, **self._options)
            except NotAFunction as error:
                self.watch.not_checked(found.name, str(error))


def _now(module: Any) -> float:
    if module.device.type == "cuda":
        torch.cuda.synchronize(module.device)
    return time.perf_counter()


def look(
    trainer: Any,
    model: Any,
    train_dataloaders: Any = None,
    datamodule: Any = None,
    *,
    steps: int = 40,
    pairs: int = 15,
    boundary: str | list[str] = "auto",
    reduction: Literal["mean", "sum"] = "mean",
    feature_dims: int | list[int] | None = None,
) -> LookReport:
    """Run a few dozen plain steps of a training, and report what they show; ``print`` what comes back.

    The steps are taken by a copy of the module, in a Trainer of its own: on one device, with the precision, gradient
    clipping and accumulation of yours, without its callbacks and loggers, without validation and without schedulers
    that wait for one. The module, the Trainer and all random states are as before; the datamodule's ``setup`` runs
    once, on a copy.

    Args:
        trainer: yours, not yet fitted. With a :class:`NewtonLosses` among its callbacks, this one is timed.
        model, train_dataloaders, datamodule: as for ``Trainer.fit``.
        steps: optimizer steps that are looked at.
        pairs: optimizer steps that are timed with the package, and as many without; 0: none.
        boundary, reduction, feature_dims: as for :class:`NewtonLosses`.

    Raises:
        ArgumentError: ``steps`` or ``pairs`` out of range; a training without a step.
        ArgumentTypeError: a module that cannot be copied.
    """
    for name, count, least in (("steps", steps, 1), ("pairs", pairs, 0)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ArgumentError(f"{name} must be an integer of {least} or more; got {count!r}.")
    rule = {"boundary": boundary, "reduction": reduction, "feature_dims": feature_dims, "log": False}
    own = next((callback for callback in trainer.callbacks if isinstance(callback, NewtonLosses)), None)
    hooked = NewtonLosses(**rule) if own is None else copy.deepcopy(own)
    hooked.log_diagnostics, hooked.prog_bar, hooked.log_figures_every_n_steps = False, False, None
    watching = _Watching(curvature=Watching(), **rule)
    looking = _Looking(watching, hooked, steps, pairs, {"reduction": reduction})
    loaders = train_dataloaders if isinstance(train_dataloaders, (list, tuple)) else [train_dataloaders]
    with random_states_kept(loaders), quiet():
        twin = _copied(model)
        own_trainer = _trainer_like(trainer, twin, [looking, watching, hooked])
        own_trainer.fit(twin, train_dataloaders=train_dataloaders, datamodule=copy.copy(datamodule))
    if not len(looking.watch):
        raise ArgumentError(
            "the training must have at least one step with a loss; got none. See its data and max_steps."
        )
    return looking.watch.report(looking.cost(), looking.optimizers)


def _copied(model: Any) -> Any:
    """The module without its Trainer."""
    try:
        return copy.deepcopy(model, {id(vars(model).get("_trainer")): None})
    except Exception as error:
        raise ArgumentTypeError(
            f"model must be a module that can be copied, since yours is left as it is; copy.deepcopy raised "
            f"{type(error).__name__}: {error}. Look before anything is attached to it, or in a script of its own."
        ) from error


def _trainer_like(trainer: Any, model: Any, callbacks: list[Any]) -> Any:
    """A Trainer with the settings that make a step what it is."""
    tree = tree_of(type(model)) or next(
        t for t in TREES if any(k.__module__.startswith(t) for k in type(trainer).__mro__)
    )
    silent = importlib.import_module(f"{tree}.loggers.logger").DummyLogger()
    return importlib.import_module(tree).Trainer(
        accelerator=type(trainer.accelerator)(),
        devices=1,
        precision=trainer.precision,
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
        limit_train_batches=trainer.limit_train_batches,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm,
        use_distributed_sampler=False,
        logger=silent,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
