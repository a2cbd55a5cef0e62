"""The door for functional code: a loss function with its running state as an argument and a result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor

from newton_plugin._curvature.damping import Damping
from newton_plugin._curvature.protocol import Curvature
from newton_plugin._doors.arguments import check_outputs, loss_at, name_of, outputs_of
from newton_plugin._errors import ArgumentError, ArgumentTypeError
from newton_plugin._step.heads import LayerHead, LinearHead
from newton_plugin._step.pure import hessians_at, preconditioned, pure_steps
from newton_plugin._step.rule import OnNonfinite
from newton_plugin._step.settings import CurvatureName, Reduction, RuleSettings, StructureChoice
from newton_plugin._step.states import initial_states, layout_in, state_from_dict, state_to_dict

__all__ = ["FunctionalNewtonLoss", "NewtonState", "functional_newton_loss"]


class NewtonState(NamedTuple):
    """The running state of a :class:`FunctionalNewtonLoss`: tensors in dictionaries, a pytree.

    Attributes:
        rules: of each of the outputs, by its position or name among the arguments of the loss.
    """

    rules: dict[str, dict[str, Any]]


class FunctionalNewtonLoss:
    """A loss function as two pure functions; made by :func:`newton_plugin.functional.newton_loss`."""

    def __init__(
        self,
        loss_fn: Callable[..., Tensor],
        settings: RuleSettings,
        outputs: int | str | Sequence[int | str],
        layer_inputs: str | None = None,
    ):
        if not callable(loss_fn):
            raise ArgumentTypeError(f"loss_fn must be callable; got {type(loss_fn).__name__}.")
        self.loss_fn = loss_fn
        self._settings = settings
        self._outputs = check_outputs(outputs)
        self._layer_inputs = _check_layer_inputs(layer_inputs, self._outputs)

    def __repr__(self) -> str:
        parts = [name_of(self.loss_fn), self._settings.describe(without=("sync",))] + [f"outputs={self._outputs}"] * (
            self._outputs != (0,)
        )
        return f"newton_plugin.functional.newton_loss({', '.join(filter(None, parts))})"

    def init(self, *args: Any, **kwargs: Any) -> NewtonState:
        """The state before the first step.

        Args:
            *args, **kwargs: the arguments of ``loss_fn``. Only shapes, dtypes and devices of the outputs matter, and
                the others may be left out: ``init(outputs)``. They are needed for a mean Hessian of more than 128
                features, whose form depends on the loss.

        Raises:
            ArgumentError: no such argument; arguments are missing that are needed.
        """
        head, kwargs = self._head(args, kwargs)
        named = self._named(args, kwargs)
        hessians = None
        if len(args) + len(kwargs) > len(named):
            hessians = hessians_at(loss_at(self.loss_fn, args, kwargs, named), named, self._settings)
        return NewtonState(dict(zip(named, initial_states(named, self._settings, hessians, head), strict=True)))

    def apply(self, state: NewtonState, *args: Any, **kwargs: Any) -> tuple[Tensor, NewtonState]:
        """The loss, whose derivative by its outputs is the Newton step, and the state after it.

        Args:
            state: of :meth:`init` or of the call before.
            *args, **kwargs: the arguments of ``loss_fn``.

        Returns:
            ``loss_fn(*args, **kwargs)``, to the bit, and the new state. The old one is as it was.

        Raises:
            ShapeError: outputs without a batch dimension, a loss that is neither one number nor one for each sample, a
                state for outputs of another shape.
            NoGradientError, NoBoundaryError: the loss does not depend on its outputs.
            ArgumentError: a state of other settings.
            TransformError: what a transform does not let this do; the message names it.
        """
        _check_state(state)
        head, kwargs = self._head(args, kwargs)
        named = self._named(args, kwargs)
        states = self._states(state, named)
        found = pure_steps(
            loss_at(self.loss_fn, args, kwargs, named),
            {name: y.detach() for name, y in named.items()},
            lambda _: states,
            self._settings,
            head=head,
        )
        loss = preconditioned(found, list(named.values()))
        return loss, NewtonState(dict(zip(named, found.states, strict=True)))

    def state_dict(self, state: NewtonState) -> dict[str, Any]:
        """The state in the form of :meth:`newton_plugin.LossHook.state_dict`. Of one member where there are several.

        For member k of a ``vmap``, give it ``torch.utils._pytree.tree_map(lambda t: t[k], state)``.

        Raises:
            ArgumentError: a state of several members.
        """
        rules = {name: state_to_dict(rule) for name, rule in state.rules.items()}
        return {"rules": rules, "in_turn": False, "by_position": True, "found_once": True, "skipped": 0}

    def load_state_dict(self, state: dict[str, Any], *args: Any, **kwargs: Any) -> NewtonState:
        """A state from :meth:`state_dict`, or from that of a :class:`newton_plugin.LossHook` with the same settings.

        Args:
            state: as many layers as there are outputs here; they are taken in their order.
            *args, **kwargs: as for :meth:`init`.

        Raises:
            ArgumentError: another number of layers, other settings, or outputs of another shape.
            ArgumentTypeError: no state_dict at all.
        """
        if not (isinstance(state, Mapping) and isinstance(state.get("rules"), Mapping)):
            raise ArgumentTypeError(
                "state must be what state_dict() returned, a dictionary with the entry 'rules'; got "
                f"{type(state).__name__}."
            )
        fresh = self.init(*args, **kwargs)
        if len(state["rules"]) != len(fresh.rules):
            raise ArgumentError(
                f"state must hold one rule for each of outputs={self._outputs}; got {sorted(state['rules'])}. Load the "
                "state of a hook whose loss ended at as many layers."
            )
        pairs = zip(fresh.rules.items(), state["rules"].values(), strict=True)
        return NewtonState({name: state_from_dict(saved, like, self._settings) for (name, like), saved in pairs})

    def _head(self, args: Any, kwargs: dict[str, Any]) -> tuple[LayerHead | None, dict[str, Any]]:
        """The last layer, if its inputs are given; and the arguments of the loss without them."""
        name = self._layer_inputs
        if name is None:
            return None, kwargs
        kwargs = dict(kwargs)
        inputs = kwargs.pop(name, None)
        if not isinstance(inputs, Tensor):
            raise ArgumentError(
                f"{name} must be given by name, as layer_inputs={name!r} says: a tensor with the inputs of the layer "
                f"that made the outputs; got {type(inputs).__name__}."
            )
        (outputs,) = self._named(args, kwargs).values()
        return LinearHead(inputs, layout_in(outputs, self._settings)), kwargs

    def _named(self, args: Any, kwargs: Any) -> dict[str, Tensor]:
        return outputs_of(self.loss_fn, self._outputs, args, kwargs)

    def _states(self, state: NewtonState, named: dict[str, Tensor]) -> list[dict[str, Any]]:
        if state.rules.keys() != named.keys():
            raise ArgumentError(
                f"state must be of outputs={self._outputs}; got one of {sorted(state.rules)}. Make one by init()."
            )
        return [state.rules[name] for name in named]


def _check_layer_inputs(name: Any, outputs: Sequence[int | str]) -> str | None:
    if name is None:
        return None
    if not isinstance(name, str):
        raise ArgumentTypeError(f"layer_inputs must be the name of an argument or None; got {name!r}.")
    if len(outputs) > 1:
        raise ArgumentError(f"layer_inputs={name!r} is of one layer; got outputs={outputs}. Name one of them.")
    return name


def _check_state(state: Any) -> None:
    if not (isinstance(state, NewtonState) and isinstance(state.rules, dict)):
        given = getattr(state, "rules", state)
        raise ArgumentTypeError(
            f"state must be what init() or the last apply() returned; got {type(given).__name__}. Call "
            "apply(state, outputs, ...), with the state first."
        )


def functional_newton_loss(
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
    layer_inputs: str | None = None,
) -> FunctionalNewtonLoss:
    """Newton Losses for functional code: the running state is an argument and a result.

    ``init(outputs) -> state`` and ``apply(state, outputs, *args) -> (loss, state)`` work under ``torch.func``'s
    ``grad``, ``vjp``, ``jvp``, ``linearize``, ``jacrev``, ``jacfwd``, ``hessian``, ``vmap`` and ``functional_call`` in
    any nesting, under ``torch.compile(fullgraph=True)``, and with ``loss.backward()``. Each member of a ``vmap`` has
    its own batch, its own C and its own state. The value of the loss is the user's. Its derivative by the outputs is
    the step, its second derivative that of the surrogate, ``I``. By other arguments it has the loss's own derivatives,
    multiplied by the size of the step where the damping is relative.

    Args:
        loss_fn: returns one number, or one for each sample. It has to work under ``torch.func.grad``.
        curvature, damping, structure, power, reduction, feature_dims: see :class:`newton_plugin.LossHook`.
            ``refresh_every`` has to be 1. "auto" works where the Hessian is known in closed form. A class of your own
            keeps all that it remembers in ``state_dict()``, whose entries ``initial_state()`` has from the start.
        outputs: which arguments hold the model's outputs: positions or names. Each has a curvature of its own; outputs
            that several calls of one layer made are one batch if they are concatenated.
        on_nonfinite: "keep" the gradient where it is not finite, or "raise". Under ``vmap`` and ``torch.compile``,
            where nobody can raise, "raise" makes the step NaN.
        layer_inputs: the name under which ``init`` and ``apply`` also get the inputs of the linear layer that made the
            outputs, (N, ..., d); the loss does not. A rule that looks at the last layer (``structure="gated"``) sees no
            layer without them.

    Each process of a distributed run takes the C of its own samples.

    Raises:
        NewtonPluginError: on a wrong argument, naming it.

    Example, eight networks at once:
        >>> import torch, newton_plugin as npl
        >>> from torch.func import grad, vmap
        >>> newton = npl.functional.newton_loss(torch.nn.functional.cross_entropy)
        >>> weights, x, target = torch.randn(8, 3, 5), torch.randn(16, 5), torch.randint(0, 3, (16,))
        >>> states = vmap(lambda w: newton.init(x @ w.T))(weights)
        >>> def loss(w, state):
        ...     return newton.apply(state, x @ w.T, target)
        >>> gradients, states = vmap(grad(loss, has_aux=True))(weights, states)
        >>> gradients.shape
        torch.Size([8, 3, 5])
    """
    settings = RuleSettings(curvature, damping, structure, power, reduction, feature_dims, on_nonfinite, sync=False)
    return FunctionalNewtonLoss(loss_fn, settings, outputs, layer_inputs)
