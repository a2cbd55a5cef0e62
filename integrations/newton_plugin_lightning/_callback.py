"""NewtonLosses: applies the loss hook in ``training_step``, for the length of one ``fit``.

Lightning's own hooks come too late: ``on_before_backward`` gets a loss that is already divided by
``accumulate_grad_batches``, and its return value is ignored. When ``training_step`` returns, the loss is the user's own
and its autograd graph is complete, so the step is taken there. In manual optimization it is taken where
``manual_backward`` is entered, once for each loss.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from newton_plugin import ArgumentTypeError, Curvature, Damping, LossHook
from newton_plugin_lightning._arguments import check_every, check_flag, check_start_step, check_stop_step, differing
from newton_plugin_lightning._bases import CallbackBase
from newton_plugin_lightning._observer import Observer
from newton_plugin_lightning._patch import MethodPatch
from newton_plugin_lightning._telling import tell, warn_of_lbfgs
from newton_plugin_lightning._uncompiled import Uncompiled

__all__ = ["NewtonLosses"]


class NewtonLosses(CallbackBase):
    """Trains with Newton Losses: a second-order step at the loss, then ordinary backpropagation.

    Add it to a Trainer, ``Trainer(callbacks=[NewtonLosses()])``; the LightningModule stays as it is. Where
    the model's outputs ``y`` meet the loss, the gradient ``g`` of each sample is replaced by the step
    ``(C + damping I)^-power g``; the network below gets that through its own backward pass, and the optimizer
    works as before. The value of the loss, and so what is logged, does not change. Validation, test and
    predict are not touched, and nothing of the callback stays in the module after ``fit``, also if it ends
    with an exception.

    Works with automatic optimization (a loss returned as a tensor or under the key ``"loss"``) and with
    manual optimization (losses passed to ``self.manual_backward``). The idea is from Petersen et al., "Newton
    Losses: Using Curvature Information for Learning with Differentiable Algorithms", NeurIPS 2024.

    Args:
        curvature: Where C comes from. "fisher": the mean of g g' over the batch, nearly free. "hessian": the
            second derivative of the loss. "norm": no matrix, each g divided by a smooth norm of itself.
            "auto": chosen from the loss. Or an instance, such as ``newton_plugin.EmpiricalFisher()``.
        damping: What is added to C before it is inverted. "auto" needs no tuning: it is relative to C. A
            positive number is absolute, as in the paper; larger is closer to plain gradient descent. Or an
            instance, such as ``newton_plugin.AutoDamping(ratio=1.0)``.
        structure: How much of C is kept. "mean": one matrix for the batch, as in the paper. "per_sample": one
            for each sample. "isotropic": its mean eigenvalue only, no directions. "diagonal": its diagonal, for wide
            outputs. "block": one matrix for each position of a sequence or an image, whose features `feature_dims`
            names. "auto": "isotropic" for Fisher with damping "auto", "mean" for everything else.
        power: 1 for a Newton step, 0.5 for the inverse square root of C (a whitening, as in Adam).
        reduction: How the loss reduces over the batch, "mean" or "sum".
        boundary: Where outputs end and the loss begins. "auto": the first operations with parameters, seen
            from the loss. Or the name of a submodule (its output), the name of the loss (its input), or a
            list of names.
        feature_dims: Dimensions of the outputs that belong to one sample; all but the first if not given. For
            (N, C, H, W) with a loss per pixel: 1.
        start_step: Leave the first optimizer steps (``trainer.global_step``) plain, as a warm-up.
        stop_step: Leave the steps from this one on plain; None: never.
        enabled: False: training is plain. The attribute of that name switches a running training from the next batch
            on, on all ranks alike; the running curvature is kept.
        sync: In distributed training, average C over all processes, so that they take the step of one process with
            the whole batch. "lagged": with the averages of the step before, and no process waits for another (an
            approximation; structure "isotropic" or "per_sample", or curvature "norm"). False: each uses the C of its
            own part of the batch (no communication; results depend on how the batch is split, and a checkpoint holds
            the running curvature of rank 0 alone).
        compile_step: Compile what happens between gradient and step by ``torch.compile``: a few kernels in place of
            about 30 operations, after some seconds at the first step. Without a compiler steps are eager.
        log: Log gradient norm, step norm, extreme eigenvalues of C, damping and fallbacks through the
            Trainer's logger, as ``newton/...``, every ``log_every_n_steps``; and say at the end of ``fit`` what the
            steps did.
        log_figures_every_n_steps: Draw the eigenvalues of C and the sizes of the samples' gradients into TensorBoard
            or W&B, every so many optimizer steps; needs matplotlib. None: never.
        prog_bar: Show ``newton/step_norm`` in the progress bar, as often; also without a logger.

    Raises:
        ArgumentError: A value outside its rule, when the callback is made and not first in training.
        ArgumentTypeError: A value of the wrong type.
    """

    def __init__(
        self,
        *,
        curvature: Literal["fisher", "hessian", "norm", "auto"] | Curvature = "fisher",
        damping: float | Literal["auto"] | Damping = "auto",
        structure: Literal["auto", "mean", "per_sample", "isotropic", "diagonal", "block", "gated"] = "auto",
        power: float = 1,
        reduction: Literal["mean", "sum"] = "mean",
        boundary: str | list[str] = "auto",
        feature_dims: int | list[int] | None = None,
        start_step: int = 0,
        stop_step: int | None = None,
        enabled: bool = True,
        sync: bool | Literal["lagged"] = True,
        compile_step: bool = False,
        log: bool = True,
        log_figures_every_n_steps: int | None = None,
        prog_bar: bool = False,
    ) -> None:
        super().__init__()
        self._rule = {
            "curvature": curvature,
            "damping": damping,
            "structure": structure,
            "power": power,
            "reduction": reduction,
            "boundary": boundary,
            "feature_dims": feature_dims,
            "sync": sync,
            "compile_step": check_flag("compile_step", compile_step),
        }
        self.hook = LossHook(**self._rule)
        self.start_step = check_start_step(start_step)
        self.stop_step = check_stop_step(stop_step, self.start_step)
        self.enabled = check_flag("enabled", enabled)
        # Not `self.log`: Lightning puts the module's own `log` there, on every callback.
        self.log_diagnostics = check_flag("log", log)
        self.log_figures_every_n_steps = check_every("log_figures_every_n_steps", log_figures_every_n_steps)
        self.prog_bar = check_flag("prog_bar", prog_bar)
        self._initial_state = copy.deepcopy(self.hook.state_dict())
        self._module: weakref.ref[nn.Module] | None = None
        self._forget_fit()

    def __repr__(self) -> str:
        names = ("start_step", "stop_step", "enabled", "log_figures_every_n_steps", "prog_bar")
        own = {name: getattr(self, name) for name in names}
        return f"NewtonLosses({differing(NewtonLosses, {**self._rule, **own, 'log': self.log_diagnostics})})"

    def _forget_fit(self) -> None:
        self._patch: MethodPatch | None = None
        self._observer: Observer | None = None
        self._attached = self._checked = self._near = False
        self._hooked = False
        self._losses = 0
        self._uncompiled = Uncompiled()
        self._told = False

    @override
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wrap the steps of this module instance, for ``fit`` only."""
        if stage != "fit":
            return
        self._unwrap()
        if self._module is not None and self._module() is not pl_module:
            # Another model: the running mean of C belongs to the model that it was measured on.
            self.hook.load_state_dict(copy.deepcopy(self._initial_state))
        self._module = weakref.ref(pl_module)

        def training_step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self._training_step(trainer, pl_module, original, *args, **kwargs)

        def manual_backward(original: Callable[..., Any], loss: Any, *args: Any, **kwargs: Any) -> Any:
            if self._near and _is_training(trainer):
                self._apply(trainer, loss)
            return original(loss, *args, **kwargs)

        around = {"training_step": training_step, "manual_backward": manual_backward}
        self._patch = MethodPatch(pl_module, around)
        figures = self.log_figures_every_n_steps
        self._observer = Observer(self.hook, trainer, self.log_diagnostics, self.prog_bar, figures)

    @override
    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Put the module back as it was."""
        self._unwrap()

    @override
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The same after an error or an interrupt, where Lightning does not call ``teardown``."""
        self._unwrap()

    @property
    @override
    def state_key(self) -> str:
        """One state for each boundary that is named, so that several callbacks fit in one Trainer."""
        name, boundary = type(self).__qualname__, self.hook.boundary
        return name if boundary == "auto" else f"{name}{{'boundary': {boundary!r}}}"

    @override
    def state_dict(self) -> dict[str, Any]:
        """The running curvature, as plain types and tensors; loads with ``weights_only=True``.

        It is never empty: Lightning skips empty states, and the learning-rate finder, which trains and then restores
        every state, could not restore this one.
        """
        return {"hook": self.hook.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.hook.load_state_dict(state_dict["hook"])

    def _training_step(self, trainer: Any, module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._hooked, self._losses = False, 0
        if not _is_training(trainer):
            return original(*args, **kwargs)
        assert self._observer is not None
        self._near = self._switched_on(trainer, module)
        if not self._near:
            return original(*args, **kwargs)
        self._observer.step_begins()
        with self.hook.watch():
            output = self._uncompiled(original)(*args, **kwargs)
        if module.automatic_optimization:
            self._apply(trainer, output.get("loss") if isinstance(output, Mapping) else output)
        else:
            self._after_step(module)  # in manual optimization, training_step has run the backward passes itself
        return output

    def _switched_on(self, trainer: Any, module: Any) -> bool:
        """Whether this batch may take steps. While batches do not, the hook leaves nothing in the module.

        In manual optimization start_step may come in the middle of a batch: each optimizer step counts.

        Not in our setup: the module's own setup and configure_model run later and may add layers. Names that mean
        nothing are refused at the first batch, also before start_step.
        """
        on = self.enabled and self._in_time(trainer, not module.automatic_optimization)
        if not self._attached and (on or (self.enabled and not self._checked)):
            self.hook.attach(module)
            with contextlib.suppress(ArgumentTypeError):  # a strategy's own, of which nothing is known
                self.hook.set_optimizer(trainer.optimizers)
            self._attached = self._checked = True
        if self._attached and not on:
            self.hook.detach()
            self._attached = False
        return on

    def _in_time(self, trainer: Any, soon: bool = False) -> bool:
        """Whether the optimizer steps so far lie between start_step and stop_step; with ``soon``, or before both."""
        step = trainer.global_step
        return (soon or step >= self.start_step) and (self.stop_step is None or step < self.stop_step)

    @override
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A batch begins; the summary tells how long they take."""
        if self._observer is not None:
            self._observer.batch_begins()

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """It ends."""
        if self._observer is not None:
            self._observer.batch_ends()

    @override
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say what the steps of this fit did."""
        if self._observer is not None:
            self._observer.fit_ends()

    @override
    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Log the diagnostics of the step that this backward pass has taken."""
        if pl_module.automatic_optimization:
            self._after_step(pl_module)

    def _after_step(self, module: Any) -> None:
        if self._hooked and self._observer is not None:
            self._observer.step_ended(module)

    def _apply(self, trainer: Any, loss: Any) -> None:
        # None skips the step; what is neither that nor a tensor is for Lightning to refuse.
        if isinstance(loss, Tensor) and self._in_time(trainer):
            assert self._observer is not None
            # In manual optimization the k-th loss of a batch (a GAN's two, say) keeps a curvature of its own.
            with self._observer.hooked():
                self.hook(loss, name=f"loss{self._losses + 1}" if self._losses else "")
            if not self._told and self.hook.boundaries:
                self._tell(trainer)
            self._hooked = True
            self._losses += 1

    def _tell(self, trainer: Any) -> None:
        """Say once what was found, and what does not fit."""
        self._told = True
        tell(trainer, "NewtonLosses: the step is taken at %s", self.hook.describe())
        warn_of_lbfgs(trainer)

    def _unwrap(self) -> None:
        if self._patch is not None:
            self._patch.remove()
        self.hook.detach()
        self._forget_fit()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles belong to no ``fit``: they have the settings and the running state, and no module."""
        left_out = ("log", "log_dict")  # set by Lightning, bound to the module
        state = {name: value for name, value in vars(self).items() if name not in left_out}
        return {**state, "_patch": None, "_module": None, "_observer": None, "_attached": False, "_hooked": False}


def _is_training(trainer: Any) -> bool:
    """Whether this is training. Validation may call the module's own training_step, which then stays plain."""
    return trainer.training and torch.is_grad_enabled()
