"""The door for a loss tensor: one line between the loss and ``backward()``.

A call of the hook finds the boundaries of the loss, takes the rule that holds the running state of each, and lets the
engine replace the gradients there. This file also words every warning and error about where the boundaries are.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from newton_plugin._boundary.finder import free_boundaries
from newton_plugin._boundary.search import BoundarySearch
from newton_plugin._curvature.damping import Damping
from newton_plugin._curvature.protocol import Curvature
from newton_plugin._doors.diagnostics import diagnostics
from newton_plugin._doors.doubts import find, shared_late
from newton_plugin._doors.found import Found, FoundBoundary, describe_boundaries
from newton_plugin._doors.hooked_loss import check_graph, check_loss, check_transforms, operation_of, wants_tangent
from newton_plugin._doors.host_time import HessianCost, HostTime, dear_hessian
from newton_plugin._doors.last_step import LastStep, last_steps
from newton_plugin._doors.layer_names import MAX_LAYERS
from newton_plugin._doors.optimizers import is_memoryless
from newton_plugin._doors.running_states import RunningStates
from newton_plugin._errors import ArgumentTypeError
from newton_plugin._runtime.compiler import eager
from newton_plugin._step.engine import precondition
from newton_plugin._step.exchange import tell, telling
from newton_plugin._step.rule import OnNonfinite, StepRule
from newton_plugin._step.settings import CurvatureName, Reduction, RuleSettings, StructureChoice, Sync
from newton_plugin._step.sharing import Sharing

__all__ = ["LossHook"]


class LossHook:
    """Newton Losses for a loss that has been computed: ``loss = hook(loss)`` before ``loss.backward()``.

    Works in a plain loop, Fabric or Accelerate, with any scaling of the loss in between. The value of the loss is
    untouched; what changes is the gradient that enters the network where its outputs meet the loss: the
    Newton step ``(C + damping I)^-power g`` in place of ``g``. With a relative damping a loss of several terms keeps
    their weights: see docs/choosing.md. :attr:`boundaries` tells what was found.

    Args:
        curvature: "fisher", "hessian", "norm", "auto", or an instance.
        damping: a positive number (Tikhonov, in units of C), "auto", or an instance.
        structure: how much of C is kept: "mean" (the paper's matrix), "per_sample", "isotropic", "diagonal" or "block"
            (one matrix for each position of a sequence or an image; needs ``feature_dims``). "auto": "isotropic" for
            Fisher with a relative damping, what no comparison of docs/when-it-helps.md found a matrix to beat; "mean"
            for a fixed damping, the Hessian and power 0.5.
        power: 1, or 0.5.
        reduction: whether the loss is the "mean" or the "sum" over the samples.
        boundary: "auto" finds the outputs in the autograd graph; otherwise the name of a submodule (its
            output), of a loss (what it is called with), or a list of names. Names need ``module``.
        feature_dims: which dimensions of the outputs are features; None: all but the first, or what the graph tells
            (heads stacked on the first dimension, time first under CTC, a single sample without a batch).
        on_nonfinite: "keep" leaves a gradient that is not finite as it is, and counts it; "raise" raises
            (for debugging: it waits for the device at every step).
        sync: average the curvature over all processes of ``torch.distributed``, if there are several: R ranks then
            take the step of one process with the whole batch, and all of them must call the hook at every step.
            "lagged": the same with the averages of the step before, and no rank waits for another; for curvatures
            whose statistics are one number (Fisher with structure "isotropic" or "per_sample", "norm"); see
            docs/several-processes.md. False: each rank uses the C of its own samples, and a running mean of its own.
        compile_step: compile what happens between gradient and step by ``torch.compile``: 5 to 8 kernels in place of
            about 30 operations, after some seconds at the first step and at the first other batch size. Of rules that
            need no Hessian, where the step is made in the ordinary backward pass; elsewhere it changes nothing. Without
            a compiler steps are eager, with one warning; they also are with refresh_every, and with a curvature or
            damping of your own that has attributes and no ``initial_state``.
        module: the model, where ``boundary`` names a part of it; the same as :meth:`attach`.
        enabled: False: losses stay as they are. The attribute of that name switches a running training, on all ranks
            alike; the running state is kept.

    Raises:
        NewtonPluginError: on a wrong argument, naming it.

    Example:
        >>> import torch, newton_plugin as npl
        >>> model, hook = torch.nn.Linear(3, 2), npl.LossHook(damping=0.1)
        >>> x, target = torch.randn(8, 3), torch.randint(0, 2, (8,))
        >>> loss = hook(torch.nn.functional.cross_entropy(model(x), target))
        >>> loss.backward()
    """

    def __init__(
        self,
        *,
        curvature: CurvatureName | Curvature = "fisher",
        damping: float | Literal["auto"] | Damping = "auto",
        structure: StructureChoice = "auto",
        power: float = 1,
        reduction: Reduction = "mean",
        boundary: str | Sequence[str] = "auto",
        feature_dims: int | Sequence[int] | None = None,
        on_nonfinite: OnNonfinite = "keep",
        sync: Sync = True,
        compile_step: bool = False,
        module: nn.Module | None = None,
        enabled: bool = True,
    ) -> None:
        self._settings = RuleSettings(
            curvature, damping, structure, power, reduction, feature_dims, on_nonfinite, sync, compile_step
        )
        if not isinstance(enabled, bool):
            raise ArgumentTypeError(f"enabled must be True or False; got {enabled!r} of type {type(enabled).__name__}.")
        self.boundary, self.enabled = boundary, enabled
        self._search = BoundarySearch(boundary)
        self._states = RunningStates(self._settings)
        self._used: list[StepRule] = []
        self._sharing: dict[tuple[str, ...], Sharing] = {}
        self._found = Found()
        self._found_once = False
        self._skipped = 0
        self._reported: set[str] = set()
        self._time: HostTime | None = None
        self._cost = HessianCost() if self._settings.build().curvature.needs_hessian else None
        if module is not None:
            self.attach(module)

    def __repr__(self) -> str:
        parts = [self._settings.describe()] + [f"boundary={self.boundary!r}"] * (self.boundary != "auto")
        parts += ["enabled=False"] * (not self.enabled)
        found = f"  # {self.describe()}" if self._found.layouts else ""
        return f"LossHook({', '.join(filter(None, parts))}){found}"

    def __getstate__(self) -> dict[str, Any]:
        """A copy keeps settings and running state; it is attached to no module and knows no last batch."""
        fresh = {
            "_search": BoundarySearch(self.boundary),
            "_used": [],
            "_sharing": {},
            "_found": Found(),
            "_time": None,
        }
        return {**self.__dict__, **fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._warn_of_order()

    def _warn_of_order(self) -> None:
        """Say that states without names of layers go to the layers in the order in which these are met."""
        if self._states.go_by_order:
            self._report(
                "newton_plugin: the states of several layers, which served different losses, are taken over by a hook "
                "that knows no names of layers. They go to the layers in the order in which losses meet these. If the "
                "order may be another now, pass module= to both hooks."
            )

    @property
    def boundaries(self) -> tuple[FoundBoundary, ...]:
        """Where the last loss ended: for each boundary its name, shape, samples, features, curvature and damping.

        What the loss reaches beside them is in ``beside`` of each, what was passed over in ``left_out``. Empty before
        the first loss.
        """
        return self._found.boundaries()

    def describe(self) -> str:
        """The same in one line, for a log."""
        return describe_boundaries(self.boundaries)

    def attach(self, module: nn.Module) -> None:
        """Tell the hook the model, so that names mean something; registers forward hooks on named submodules.

        Raises:
            ArgumentError: a boundary's name that the model does not have.
        """
        self._search.attach(module)

    def detach(self) -> None:
        """Remove everything that :meth:`attach` registered."""
        self._search.detach()

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Put this around the forward pass and the loss where ``boundary`` names a method or a function."""
        with self._search.watch():
            yield

    @contextmanager
    def timed(self) -> Iterator[HostTime]:
        """Inside, calls of the hook are timed on the host: ``seconds``, complete after the backward pass."""
        self._time = HostTime()
        try:
            with self._time.running():
                yield self._time
        finally:
            self._time = None

    @eager
    def __call__(self, loss: Tensor, name: str = "") -> Tensor:
        """Take the Newton step; return the same tensor, whose backward now sends it.

        Args:
            loss: one number, with its graph. Under ``torch.no_grad()`` nothing happens.
            name: tells apart several losses that end at the same layer (a GAN's two at the critic), so that each
                has a running curvature of its own.

        Raises:
            NoGradientError: the loss has no graph.
            NoBoundaryError: at the first call, if no outputs were found under the loss.
            ShapeError: more than one number.
            TransformError: under ``vmap`` or in forward mode.
            BatchCoupledError, OutputsTooLargeError: see :class:`newton_plugin.Hessian`.
            RanksDisagreeError: on every rank, if the ranks do not find the same boundaries; with sync="lagged", and on
                accelerators where nothing waits for the device, at the next call.
        """
        check_loss(loss)
        if not self.enabled:
            with self._search.watch():  # forgets what named parts have recorded
                return loss
        if self._cost is None:
            return self._take(loss, name)
        with self._cost.measured():
            self._take(loss, name)
        if self._cost.dear and self._used:
            self._report(dear_hessian(self._used[0].curvature, *self._cost.dear))
        return loss

    def _take(self, loss: Tensor, name: str) -> Tensor:
        """The step at the boundaries of a loss."""
        if not torch.is_grad_enabled() and not wants_tangent(loss):
            return loss
        if self._found_once and loss.is_leaf and loss.requires_grad:  # an empty batch's loss that stands for itself
            tell("no boundary", loss, self._settings)
            self._skipped += 1
            return loss
        check_transforms(loss)
        with telling(loss, self._settings):
            check_graph(loss)
        if self._search.leaves_alone(loss):
            return loss  # wrapped by newton_loss, or hooked before
        with telling(loss, self._settings):
            cut = find(self._search, loss, self._settings, not self._found_once, self._report)
        if not cut.boundaries:  # other ranks would wait for this one's part of the mean
            self._skipped += not cut.preconditioned
            tell("no boundary", loss, self._settings)
        boundaries = free_boundaries(loss, cut.boundaries)
        if boundaries:
            with telling(loss, self._settings):
                keys = self._states.keys_of(boundaries, name)
            self._used = self._states.of(keys)
            if len(self._sharing) > 4 * MAX_LAYERS:  # widths that change all the time
                self._sharing.clear()
            sharing = self._sharing.setdefault((*keys, operation_of(loss)), Sharing())
            with nullcontext() if self._time is None else self._time.around_hooks(boundaries):
                precondition(loss, boundaries, self._used, self._settings, bool(cut.beside), sharing)
            if sharing.unnoticed:
                self._report(shared_late(sharing.unnoticed))
            self._found = Found.of(boundaries, self._used, self._settings, cut.beside, cut.left_out)
            self._found_once = True
        return loss

    def _report(self, message: str) -> None:
        """Warn once for each cause, whatever shapes and numbers are in the message."""
        cause = re.sub(r"\d+", "#", message)
        if cause not in self._reported:
            self._reported.add(cause)
            warnings.warn(message, UserWarning, stacklevel=5)

    def set_optimizer(self, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> None:
        """Say which optimizer takes the steps, or which ones: size "auto" of ``structure="gated"`` asks for it.

        The callbacks of Lightning and transformers say it by themselves. It is part of no ``state_dict``.

        Raises:
            ArgumentTypeError: no optimizer.
        """
        self._states.memoryless = is_memoryless(optimizer)

    @property
    def last_steps(self) -> tuple[LastStep, ...]:
        """The last step at each boundary as tensors on its device: gradients, sizes, C. Waits for nothing."""
        return last_steps(self._found.names, self._used) if self._found.names else ()

    @property
    def fallbacks(self) -> int:
        """Batches so far that kept their gradient or used Fisher in place of the Hessian. Waits for the device."""
        return self._skipped + sum(rule.fallbacks for rule in self._states.rules.values())

    def diagnostics(self) -> dict[str, float]:
        """Numbers about the last step that a backward pass has taken; waits for the device, so call it when you log.

        Returns:
            "gradient_norm" and "step_norm" (root mean square over the samples), "eig_min" and "eig_max" of C,
            "damping", and "fallbacks": batches so far that kept their plain gradient or used Fisher in
            place of the Hessian. With several boundaries: norms together, extremes over all, the largest damping.
            Empty before the first step.
        """
        return diagnostics(self._used, self._states.rules.values(), self._skipped)

    def state_dict(self) -> dict[str, Any]:
        """The running state of every boundary: plain types and tensors."""
        return {**self._states.state_dict(), "found_once": self._found_once, "skipped": self._skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._states.load_state_dict(state)
        self._warn_of_order()
        self._found_once, self._skipped = state["found_once"], state["skipped"]
