"""NewtonTrainerLoss: a ``compute_loss_func`` for the Hugging Face Trainer.

What the Trainer does with the loss, and what follows for the step:

* With ``gradient_accumulation_steps`` = A it counts the labels of all A batches, calls the function once for each batch
  with that count as ``num_items_in_batch``, and adds the gradients up; it divides by nothing afterwards. So each call
  has to return *the sum of its labels' losses / num_items_in_batch*.
* A Newton step must not depend on that count. The hook would take a sum that is divided by it for a mean that is too
  small by a factor c: the gradients of its samples would be too small by c, and Fisher's C by c². The step is therefore
  taken on the *mean over this batch's own labels*, and the result is multiplied by (own labels / num_items_in_batch)
  afterwards. A factor after the hook only scales: the row of token i receives step_i / num_items_in_batch.
* Over several processes the Trainer multiplies by their number, and DDP divides by it: factors after the hook again.
* Its ``label_smoothing_factor`` belongs to the loss that ``compute_loss_func`` replaces. It is an argument here.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from newton_plugin import ArgumentError, ArgumentTypeError, Curvature, Damping, LossHook
from newton_plugin_transformers._base import CallbackBase
from newton_plugin_transformers._rows import Rows, select_rows

__all__ = ["NewtonTrainerLoss"]

_FILE = "newton_losses.pt"


class NewtonTrainerLoss(CallbackBase):
    """Trains with Newton Losses in a Hugging Face Trainer.

    ``Trainer(..., compute_loss_func=newton, callbacks=[newton])``: as ``compute_loss_func`` it takes the Newton step
    where the logits meet the loss, exactly under gradient accumulation, ``num_items_in_batch``, padding and mixed
    precision. The value of the loss is the one the Trainer would have had. As a callback (not needed for training) it
    adds ``newton/...`` to the logs and keeps its running curvature in the checkpoints.

    Args:
        loss_fn: ``loss_fn(logits, labels)``, the mean over its samples. None: cross-entropy.
        per_label: whether each label is a sample (a class, a token): the loss then gets rows (R, V) and labels (R,)
            without the labels -100. False: each entry of the batch is a sample, logits and labels go to the loss as
            they are. None: True for the default loss, False for ``loss_fn``.
        shift_labels: whether the logits at a token predict the next token's label. Has to be given for language
            models; None: read off the kind of output, where that tells.
        label_smoothing: of the default loss, in [0, 1]. ``TrainingArguments.label_smoothing_factor`` has no effect
            with any ``compute_loss_func``.
        curvature, damping, structure, power, feature_dims, sync, compile_step: see :class:`newton_plugin.LossHook`.
            A matrix C over a vocabulary of V words (structure "mean") is of V x V numbers; see
            ``docs/integrations.md``.
        start_step: leave the first optimizer steps (``state.global_step``) plain, as a warm-up. Asks for the callback.
        stop_step: leave the steps from this one on plain; None: never. Asks for the callback, too.
        enabled: False: the loss is plain. The attribute of that name switches a running training, on all ranks alike;
            the running curvature is kept.
        log: as a callback, add the diagnostics of the last step to the logs.

    Raises:
        ArgumentError, ArgumentTypeError: a wrong argument, when it is made; labels or logits that do not fit, at the
            first step; ``start_step`` or ``stop_step`` where the Trainer does not have it among its callbacks.

    Example:
        >>> import torch
        >>> from newton_plugin_transformers import NewtonTrainerLoss
        >>> newton = NewtonTrainerLoss(damping=1.0, label_smoothing=0.1)
        >>> logits, labels = torch.zeros(4, 2, requires_grad=True), torch.tensor([0, 1, -100, 1])
        >>> loss = newton({"logits": logits}, labels, num_items_in_batch=6)  # 3 labels here, 3 in another batch
        >>> bool(torch.isclose(loss, 3 / 6 * torch.tensor(2.0).log()))
        True
    """

    def __init__(
        self,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        per_label: bool | None = None,
        shift_labels: bool | None = None,
        label_smoothing: float = 0.0,
        curvature: Literal["fisher", "hessian", "norm", "auto"] | Curvature = "fisher",
        damping: float | Literal["auto"] | Damping = "auto",
        structure: Literal["auto", "mean", "per_sample", "isotropic", "diagonal", "gated"] = "auto",
        power: float = 1,
        feature_dims: int | list[int] | None = None,
        sync: bool | Literal["lagged"] = True,
        compile_step: bool = False,
        start_step: int = 0,
        stop_step: int | None = None,
        enabled: bool = True,
        log: bool = True,
    ) -> None:
        if loss_fn is not None and not callable(loss_fn):
            raise ArgumentTypeError(f"loss_fn must be callable, or None; got {type(loss_fn).__name__}.")
        _check_flags(per_label=per_label, shift_labels=shift_labels, log=log)
        self.start_step, self.stop_step = _check_steps(start_step, stop_step)
        self._step: int | None = None  # of the Trainer, where the callback is told
        self.per_label = loss_fn is None if per_label is None else per_label
        if not self.per_label and (shift_labels or loss_fn is None):
            name = "shift_labels=True" if shift_labels else "the default loss"
            raise ArgumentError(f"{name} needs per_label=True, a loss that is a mean over labels; got {per_label!r}.")
        self.label_smoothing = _check_smoothing(label_smoothing, loss_fn)
        self.loss_fn, self.shift_labels, self.log_diagnostics = loss_fn, shift_labels, log
        # The selected rows pass through this module, which gives the boundary a name.
        self._rows = nn.ModuleDict({"rows": nn.Identity()})
        self._rule = {
            "curvature": curvature,
            "damping": damping,
            "structure": structure,
            "power": power,
            "feature_dims": feature_dims,
            "sync": sync,
            "compile_step": compile_step,
        }
        self.hook = LossHook(**self._rule, boundary="rows", module=self._rows, enabled=enabled)
        self._initial_state = copy.deepcopy(self.hook.state_dict())
        self._model: weakref.ref[Any] | None = None

    def __repr__(self) -> str:
        names = ("per_label", "shift_labels", "label_smoothing", "start_step", "stop_step", "enabled")
        own = {"loss_fn": self.loss_fn, **{name: getattr(self, name) for name in names}}
        own["per_label"] = None if self.per_label == (self.loss_fn is None) else self.per_label
        given = {**own, **self._rule, "log": self.log_diagnostics}
        defaults = {k: p.default for k, p in inspect.signature(NewtonTrainerLoss).parameters.items()}
        shown = {k: v for k, v in given.items() if type(v) is not type(defaults[k]) or v != defaults[k]}
        return f"NewtonTrainerLoss({', '.join(f'{k}={v!r}' for k, v in shown.items())})"

    @property
    def enabled(self) -> bool:
        """Whether losses take steps; may be set at any time."""
        return self.hook.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        _check_flags(log=True, enabled=value)
        self.hook.enabled = value

    def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """The loss of one batch, whose backward pass sends the Newton step.

        Args:
            outputs: what the model returned.
            labels: integers, or whatever ``loss_fn`` takes.
            num_items_in_batch: labels in all batches of this optimizer step; None: those of this batch alone.
        """
        rows = select_rows(outputs, labels, self.per_label, self.shift_labels)
        logits = self._rows["rows"](rows.logits)
        loss = self._loss(logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits, rows)
        if self._in_time():
            loss = self.hook(loss)
        return loss if num_items_in_batch is None else loss * rows.count / num_items_in_batch

    def _in_time(self) -> bool:
        """Whether the Trainer's step lies between ``start_step`` and ``stop_step``."""
        if self.start_step == 0 and self.stop_step is None:
            return True
        if self._step is None:
            raise ArgumentError(
                f"start_step={self.start_step}, stop_step={self.stop_step}: the steps of the Trainer are not known, "
                "because NewtonTrainerLoss is not among its callbacks. Add it: Trainer(..., callbacks=[newton])."
            )
        return self.start_step <= self._step and (self.stop_step is None or self._step < self.stop_step)

    def _loss(self, logits: Tensor, rows: Rows) -> Tensor:
        if self.per_label and rows.count == 0:  # there is no mean, but every rank has to call the hook at every step
            return logits.square().sum()
        if self.loss_fn is not None:
            return self.loss_fn(logits, rows.labels)
        return F.cross_entropy(logits, rows.labels, label_smoothing=self.label_smoothing)

    def diagnostics(self) -> dict[str, float]:
        """Numbers about the last step, as :meth:`newton_plugin.LossHook.diagnostics`; waits for the device."""
        return self.hook.diagnostics()

    def state_dict(self) -> dict[str, Any]:
        """The running curvature: plain types and tensors."""
        return self.hook.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.hook.load_state_dict(state)

    @override
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Learn how many optimizer steps there have been."""
        self._step = state.global_step

    @override
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the diagnostics to a line of training, in what later callbacks get and in ``state.log_history``."""
        if not self.log_diagnostics or logs is None or "loss" not in logs:
            return
        values = {f"newton/{name}": value for name, value in self.diagnostics().items()}
        logs.update(values)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(values)

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from the checkpoint that the Trainer resumes; begin anew with another model."""
        model, optimizer = kwargs.get("model"), kwargs.get("optimizer")
        if optimizer is not None:
            with contextlib.suppress(ArgumentTypeError):  # a backend's own, of which nothing is known
                self.hook.set_optimizer(optimizer)
        if model is not None and self._model is not None and self._model() is not model:
            self.load_state_dict(copy.deepcopy(self._initial_state))
        self._model = None if model is None else weakref.ref(model)
        file = _checkpoint(args, state) / _FILE
        if state.global_step and file.exists():
            self.load_state_dict(torch.load(file, weights_only=True))
        elif state.global_step:
            warnings.warn(
                f"NewtonTrainerLoss resumes without its running curvature: there is no {file}. It is measured anew "
                "from the next step on. If the file lies elsewhere, pass it to load_state_dict().",
                stacklevel=2,
            )

    @override
    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the running curvature into the checkpoint."""
        if state.is_world_process_zero:
            torch.save(self.state_dict(), _checkpoint(args, state) / _FILE)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles: settings and running state, no model."""
        return {**vars(self), "_model": None, "_step": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.hook.attach(self._rows)


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _check_flags(log: Any, **optional: Any) -> None:
    for name, value in {"log": log, **optional}.items():
        if not isinstance(value, bool) and (value is not None or name == "log"):
            raise ArgumentTypeError(f"{name} must be True or False; got {value!r} of type {type(value).__name__}.")


def _check_smoothing(value: Any, loss_fn: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"label_smoothing must be a number; got {value!r} of type {type(value).__name__}.")
    if not 0 <= value <= 1:
        raise ArgumentError(f"label_smoothing must lie in [0, 1]; got {value!r}.")
    if value and loss_fn is not None:
        raise ArgumentError(
            f"label_smoothing belongs to the default loss; got {value!r} together with loss_fn. Smooth in loss_fn."
        )
    return float(value)


def _check_steps(start_step: Any, stop_step: Any) -> tuple[int, int | None]:
    for name, value in (("start_step", start_step), ("stop_step", stop_step)):
        if isinstance(value, bool) or not (isinstance(value, int) or (value is None and name == "stop_step")):
            raise ArgumentTypeError(
                f"{name} must be a number of optimizer steps; got {value!r} of type {type(value).__name__}."
            )
    if start_step < 0:
        raise ArgumentError(f"start_step must be 0 (from the beginning) or positive; got {start_step!r}.")
    if stop_step is not None and stop_step <= start_step:
        raise ArgumentError(
            f"stop_step must be larger than start_step={start_step}; got {stop_step!r}, so that no step would be "
            "taken. Take enabled=False for that, or None never to stop."
        )
    return start_step, stop_step
