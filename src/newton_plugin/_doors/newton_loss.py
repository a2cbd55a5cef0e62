"""The door for a loss function: wrap a loss, or decorate one, and train as before.

The outputs are an argument of the call, so their edge in the autograd graph is known before the loss is evaluated, and
no boundary has to be searched for.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from newton_plugin._boundary.autograd_graph import (
    Boundary,
    Edge,
    edge_of,
    explore,
    is_leaf,
    is_preconditioned,
    make_boundary,
)
from newton_plugin._boundary.beside import beside
from newton_plugin._boundary.owner import owner_of
from newton_plugin._curvature.damping import Damping
from newton_plugin._curvature.protocol import Curvature
from newton_plugin._doors.arguments import argument, check_outputs, loss_at, name_of, outputs_of, replaced
from newton_plugin._doors.diagnostics import diagnostics
from newton_plugin._doors.layer_names import MAX_LAYERS, LayerNames
from newton_plugin._doors.optimizers import is_memoryless
from newton_plugin._doors.transformed import MemberStates, needs_pure_engine, transformed_loss
from newton_plugin._errors import ArgumentTypeError, NoBoundaryError, NoGradientError
from newton_plugin._runtime.compiler import eager
from newton_plugin._step.engine import precondition
from newton_plugin._step.exchange import telling
from newton_plugin._step.rule import OnNonfinite, StepRule
from newton_plugin._step.settings import CurvatureName, Reduction, RuleSettings, StructureChoice, Sync

__all__ = ["NewtonLoss", "newton_loss"]


class NewtonLoss(nn.Module):
    """A loss function whose backward pass sends the Newton step in place of the gradient.

    Calls go through to ``loss_fn`` and return its value, exactly. Where one wrapped loss serves several layers, each
    layer has a curvature of its own. What else ``loss_fn`` can reach (other arguments, its own parameters) takes no
    step; with a relative damping its gradient is multiplied by the size of the step, so that no term of the loss comes
    to count more than another. Under ``torch.no_grad()``, and in ``eval()`` mode, it is ``loss_fn``.

    Args:
        loss_fn: a function or module that returns one number, or one for each sample.
        curvature, damping, structure, power, reduction, feature_dims, on_nonfinite, sync, compile_step: see
            :class:`LossHook`.
        outputs: which argument holds the model's outputs: a position, a name, or several of them. Arguments that
            different layers made have a curvature each; those of one layer's calls share one. For a method, positions
            count from the first argument after ``self``.

    Raises:
        NoGradientError: when called in training mode with outputs that do not require grad.
        NoBoundaryError: when the loss does not depend on its outputs.

    The running mean behind ``damping="auto"`` is not part of ``state_dict()``: checkpoints are as they were.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Tensor],
        *,
        curvature: CurvatureName | Curvature = "fisher",
        damping: float | Literal["auto"] | Damping = "auto",
        structure: StructureChoice = "auto",
        power: float = 1,
        reduction: Reduction = "mean",
        outputs: int | str | Sequence[int | str] = 0,
        feature_dims: int | Sequence[int] | None = None,
        on_nonfinite: OnNonfinite = "keep",
        sync: Sync = True,
        compile_step: bool = False,
    ) -> None:
        super().__init__()
        if not callable(loss_fn):
            raise ArgumentTypeError(f"loss_fn must be callable; got {type(loss_fn).__name__}.")
        self.loss_fn = loss_fn
        self._settings = RuleSettings(
            curvature, damping, structure, power, reduction, feature_dims, on_nonfinite, sync, compile_step
        )
        self._outputs = check_outputs(outputs)
        self._rules: dict[str, StepRule] = {}
        self._used: list[StepRule] = []
        self._names = LayerNames()
        self._members = MemberStates()
        self._others_reported = self._memoryless = False
        self._clones: WeakKeyDictionary[Any, NewtonLoss] = WeakKeyDictionary()
        if not isinstance(loss_fn, nn.Module):
            functools.update_wrapper(self, loss_fn, updated=())  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """The loss and the arguments that are not defaults."""
        name = "" if isinstance(self.loss_fn, nn.Module) else getattr(self.loss_fn, "__name__", "loss_fn")
        outputs = "" if self._outputs == (0,) else f"outputs={self._outputs}"
        return ", ".join(filter(None, [name, self._settings.describe(), outputs]))

    def set_optimizer(self, optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> None:
        """See :meth:`LossHook.set_optimizer`."""
        self._memoryless = is_memoryless(optimizer)

    @eager
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The value of ``loss_fn(*args, **kwargs)``."""
        if not self.training:
            return self.loss_fn(*args, **kwargs)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if needs_pure_engine(given):
            named = outputs_of(self.loss_fn, self._outputs, args, kwargs)
            return transformed_loss(loss_at(self.loss_fn, args, kwargs, named), named, self._settings, self._members)
        if not torch.is_grad_enabled():
            return self.loss_fn(*args, **kwargs)
        like = given[0] if given else torch.empty(0)
        with telling(like, self._settings):
            named = {str(which): self._select(which, args, kwargs) for which in self._outputs}
        for name, y in named.items():
            if y.retains_grad or y._backward_hooks:
                # Hooks of y belong to the network: they shall see what enters it, not our own passes over the loss.
                named[name] = y.clone()
                args, kwargs = replaced(args, kwargs, y, named[name])
        edges = {name: edge_of(y) for name, y in named.items()}
        arguments = {edge_of(tensor) for tensor in _differentiable(args, kwargs)}
        self._report_others(arguments - set(edges.values()))
        loss = self.loss_fn(*args, **kwargs)  # its errors are not told: it may talk to other ranks itself
        with telling(like, self._settings):
            boundaries = self._boundaries(loss, edges, arguments)
        if boundaries:
            assert loss.grad_fn is not None
            rules = self._used = [self._rule(key) for key in self._keys_of(boundaries)]
            precondition(loss, boundaries, rules, self._settings, bool(beside(loss.grad_fn, boundaries)))
        return loss

    def _boundaries(self, loss: Any, edges: dict[str, Edge], arguments: set[Edge]) -> list[Boundary]:
        """Where the loss meets its outputs; none where another door has been.

        Raises:
            NoGradientError, NoBoundaryError: see the class.
        """
        if not isinstance(loss, Tensor) or loss.grad_fn is None:
            raise NoGradientError(
                f"{self._loss_name} returned a value without an autograd graph. Does it detach its outputs, or "
                "leave torch?"
            )
        if is_preconditioned((loss.grad_fn, loss.output_nr)):
            return []
        graph = explore(loss.grad_fn, arguments.__contains__)
        boundaries = []
        for name, edge in edges.items():
            boundary = make_boundary(name, edge, graph)
            if boundary.consumers:
                boundaries.append(boundary)
            elif not graph.preconditioned:
                raise NoBoundaryError(
                    f"{self._loss_name} does not depend on outputs={name!r}, the argument of shape "
                    f"{boundary.shape}. Name the argument that holds the model's outputs, outputs=...."
                )
        return boundaries

    def diagnostics(self) -> dict[str, float]:
        """Numbers about the last step, as :meth:`LossHook.diagnostics`; waits for the device.

        Under the transforms of torch.func only "fallbacks", of all members.
        """
        numbers = diagnostics(self._used, self._rules.values())
        fallbacks = numbers.get("fallbacks", 0.0) + self._members.fallbacks
        return {**numbers, "fallbacks": fallbacks} if numbers or self._members else {}

    @property
    def _loss_name(self) -> str:
        return name_of(self.loss_fn)

    def _keys_of(self, boundaries: Sequence[Boundary]) -> list[str]:
        """Which running state each argument has: that of the layer that made it. Calls of one layer share theirs."""
        owners = [owner_of(boundary.graph_edge) for boundary in boundaries]
        keys = []
        for k, (boundary, owner) in enumerate(zip(boundaries, owners, strict=True)):
            # Two parts of what one call returned are not two calls.
            parts = any(j != k and owner.calls & other.calls for j, other in enumerate(owners))
            layer = (owner.parameters, boundary.name) if parts else owner.parameters
            keys.append(self._names.of(layer if owner.parameters else None, boundary.name, len(boundaries)))
        return keys

    def _report_others(self, others: set[Edge]) -> None:
        """Warn once of arguments that a layer has made and at which no step is taken."""
        if self._others_reported or all(is_leaf(node) for node, _ in others):
            return
        self._others_reported = True
        warnings.warn(
            f"newton_plugin: {self._loss_name} was called with other arguments that require grad than "
            f"outputs={self._outputs}. No step is taken there; they get the loss's gradient in the size of its step. "
            "Name all arguments that are outputs of the model, outputs=(0, 1), or detach what is none.",
            UserWarning,
            stacklevel=6,
        )

    def _rule(self, name: str) -> StepRule:
        while name not in self._rules and len(self._rules) >= MAX_LAYERS:
            self._rules.pop(next(iter(self._rules)))
        if name not in self._rules:
            self._rules[name] = self._settings.build()
        self._rules[name].curvature.memoryless = self._memoryless
        return self._rules[name]

    def _select(self, which: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The outputs among the arguments of a call.

        Raises:
            ArgumentError, ArgumentTypeError, NoGradientError: no such argument; not a tensor; it does not require grad.
        """
        y = argument(self.loss_fn, which, args, kwargs)
        if not isinstance(y, Tensor):
            raise ArgumentTypeError(
                f"outputs={which!r} of {self._loss_name} must be a torch.Tensor; got {type(y).__name__}. Say "
                "which argument holds the model's outputs, outputs=...."
            )
        if not y.requires_grad:
            raise NoGradientError(
                f"outputs={which!r} of {self._loss_name} does not require grad: it was detached, computed under "
                "torch.no_grad(), or is not what the model returned. To evaluate only, call it under "
                "torch.no_grad() or in eval() mode; in torch.func.linearize use npl.functional.newton_loss."
            )
        return y

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        """A decorated method: each object has a running state of its own, kept here and not on the object."""
        if instance is None:
            return self
        if instance not in self._clones:
            clone = NewtonLoss(self.loss_fn)
            clone._settings = self._settings
            clone._outputs = tuple(w + 1 if isinstance(w, int) else w for w in self._outputs)
            self._clones[instance] = clone
        clone = self._clones[instance]
        clone.train(self.training and getattr(instance, "training", True))
        return MethodType(clone, instance)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles go on from the same running state; those of objects whose method it is are left out."""
        return {**{k: v for k, v in self.__dict__.items() if k != "_clones"}, "_used": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._clones = WeakKeyDictionary()


def newton_loss(
    loss_fn: Callable[..., Tensor] | None = None,
    *,
    curvature: CurvatureName | Curvature = "fisher",
    damping: float | Literal["auto"] | Damping = "auto",
    structure: StructureChoice = "auto",
    power: float = 1,
    reduction: Reduction = "mean",
    outputs: int | str | Sequence[int | str] = 0,
    feature_dims: int | Sequence[int] | None = None,
    on_nonfinite: OnNonfinite = "keep",
    sync: Sync = True,
    compile_step: bool = False,
) -> Any:
    """Wrap a loss function, ``newton_loss(fn)``, or decorate one, ``@newton_loss(damping=0.1)``.

    Arguments as :class:`NewtonLoss`; works on functions, modules and methods.

    Example:
        >>> import torch, newton_plugin as npl
        >>> @npl.newton_loss(curvature="hessian", damping=1.0)
        ... def squared(outputs, target):
        ...     return (outputs - target).square().sum(-1).mean()
        >>> y = torch.tensor([[2.0]], requires_grad=True)
        >>> squared(y, torch.zeros(1, 1)).backward()
        >>> y.grad  # 4 / (2 + 1) in place of 4
        tensor([[1.3333]])
    """
    wrap = functools.partial(
        NewtonLoss,
        curvature=curvature,
        damping=damping,
        structure=structure,
        power=power,
        reduction=reduction,
        outputs=outputs,
        feature_dims=feature_dims,
        on_nonfinite=on_nonfinite,
        sync=sync,
        compile_step=compile_step,
    )
    return wrap if loss_fn is None else wrap(loss_fn)


def _differentiable(args: Any, kwargs: Any) -> list[Tensor]:
    values = [*args, *kwargs.values()]
    return [v for v in values if isinstance(v, Tensor) and v.requires_grad]
