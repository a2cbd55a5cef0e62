"""``compile_step=True``: one boundary's step in a few kernels, compiled as the pure function that it is.

Only what lies between the gradient that arrives and the step that goes on is compiled: rows in, rows out, states in,
states out. The backward pass around it stays as it is. It is compiled once for a shape and once more for all others,
never at every step; what cannot be compiled is done eagerly, with one warning.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from newton_plugin._curvature.damping import Damping
from newton_plugin._curvature.finiteness import Finiteness
from newton_plugin._curvature.overriding import holds
from newton_plugin._curvature.protocol import Curvature, CurvatureStep
from newton_plugin._derivatives.autograd import first_line
from newton_plugin._linalg.damped_inverse import HALF, working_dtype
from newton_plugin._linalg.large_rows import nonzero_rows, squared_norms
from newton_plugin._linalg.matrices import Dense, Diagonal, Isotropic
from newton_plugin._runtime.cuda_graphs import capturing
from newton_plugin._runtime.processes import ONE_PROCESS
from newton_plugin._step.heads import GivenHead, LayerHead
from newton_plugin._step.rows import all_if_none
from newton_plugin._step.rule import StepRule
from newton_plugin._step.settings import RuleSettings

__all__ = ["CompiledStep", "compiled_step"]

_STEPS: dict[int, CompiledStep] = {}  # by the identity of their settings, which they keep alive
_MOST_SETTINGS = 64
_MOST_SEEN = 4096
_LARGE = 2**19  # numbers in all rows
_OURS = f"{__name__.partition('.')[0]}."


class CompiledStep:
    """The step of rules that are made alike; every rule keeps its own state.

    Args:
        settings: make a rule without a state.
    """

    def __init__(self, settings: RuleSettings) -> None:
        self._settings = settings
        self._functions: dict[tuple[int, bool, bool, int], Callable[..., Any]] = {}
        self._off = False
        self._seen: set[int] = set()  # numbers of rows

    def __call__(
        self, rule: StepRule, arrived: Tensor, scale: Tensor, groups: int, head: LayerHead | None = None
    ) -> Tensor | None:
        """What enters the network for rows that arrive, in their dtype; the rule is as after a step.

        Args:
            rule: holds the running state.
            arrived: rows (N, m), as the backward pass brings them.
            scale: the gradient at the loss.
            groups: rows of one sample.
            head: the last layer below; None: it is not seen, or the rule does not look.

        Returns:
            The rows that are sent; None where they are not to be had by what is compiled: nothing has changed then.
        """
        if self._off or arrived.dtype in HALF or len(arrived) < 2 or capturing(arrived) or not _is_pure(rule):
            return None
        seen = None if head is None else head.rows(arrived)
        layer = (None, None) if seen is None else (seen.gradients, seen.inputs)
        leaves, form = rule.leaves(arrived, groups, seen)
        memoryless = rule.curvature.memoryless
        key = groups, seen is None, memoryless, len(leaves)  # the form of a state follows from these and the settings
        try:
            function = self._functions.get(key)
            if function is None:
                function = self._functions[key] = _compiled(self._settings, groups, form, memoryless)
            with self._quietly(len(arrived)):
                sent, taken, damping, weight, squared, stepped, matrix, readings, *after = function(
                    arrived, scale.reshape(()), *layer, *leaves
                )
            if len(after) != len(leaves):
                raise ValueError("the state after a step has another form than initial_state() gives")
        except Exception as error:  # of the compiler, whatever it is
            self._off = True
            warnings.warn(
                "newton_plugin: compile_step=True, but torch.compile cannot compile the step here "
                f"({type(error).__name__}: {first_line(error)}). Steps are eager from now on, and the same.",
                UserWarning,
                stacklevel=2,
            )
            return None
        rule.take_over(after, form)
        structure, features = rule.curvature.structure, arrived.shape[1]
        large = stepped.numel() > 0
        rule.last = CurvatureStep(
            sent.new_empty(len(sent), 0) if large else sent,
            damping,
            matrix,
            lambda: _extremes(structure, matrix, squared, features),
            finiteness=Finiteness(taken=taken),
            sizes=(lambda: (squared.sum(), stepped[0])) if large else None,
            readings=dict(zip(rule.curvature.reading_names, readings.unbind(), strict=True)) if len(readings) else {},
        )
        rule.last_gradient, rule.last_weight = (None, None) if large else (arrived, weight)
        rule.last_factor = None
        return sent

    def _quietly(self, rows: int) -> AbstractContextManager[Any]:
        """Inside, no warning of the compiler is heard. It may be at work wherever a number of rows is new."""
        if rows in self._seen:
            return nullcontext()
        if len(self._seen) < _MOST_SEEN:
            self._seen.add(rows)
        return _quiet()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compiled_step(settings: RuleSettings) -> CompiledStep | None:
    """The compiled step of rules with these settings, the same for all of them; None if they ask for none."""
    if not settings.compile_step:
        return None
    key = id(settings)
    found = _STEPS.get(key)
    if found is None or found._settings is not settings:
        while len(_STEPS) >= _MOST_SETTINGS:
            _STEPS.pop(next(iter(_STEPS)))
        found = _STEPS[key] = CompiledStep(settings)
    return found


def _compiled(settings: RuleSettings, groups: int, form: TreeSpec, memoryless: bool) -> Callable[..., Any]:
    """The step as one compiled function of tensors."""

    def step(
        arrived: Tensor, scale: Tensor, at_layer: Tensor | None, inputs: Tensor | None, *leaves: Tensor
    ) -> tuple[Tensor | None, ...]:
        rule = settings.build()
        rule.curvature.memoryless = memoryless
        rule.restore(tree_unflatten(list(leaves), form))
        live = all_if_none(nonzero_rows(arrived).sum(), len(arrived))
        scale = scale.to(working_dtype(arrived.device))
        weight = scale / live if settings.reduction == "mean" else scale
        gradient = arrived / weight.reshape(1)
        head = None
        if at_layer is not None and inputs is not None:
            head = GivenHead(at_layer / weight.to(at_layer.dtype), inputs)
        result = rule(gradient, None, ONE_PROCESS, groups, live=live, head=head)
        taken = result.finiteness.taken
        assert taken is not None
        sent = torch.where(taken, (result.step * weight).to(arrived.dtype), arrived)
        squared, stepped = squared_norms(gradient), arrived.new_empty(0)
        if arrived.numel() >= _LARGE:  # whose rows are not kept for somebody who might ask
            stepped = squared_norms(result.step).sum().reshape(1)
        readings = [result.readings[name] for name in rule.curvature.reading_names if name in result.readings]
        read = torch.stack(readings) if readings else weight.new_empty(0)
        state = rule.tensors()
        after = tree_flatten(_ordered(state, tree_unflatten(list(leaves), form)))[0]
        return sent, taken, result.damping, weight, squared, stepped, result.matrix, read, *after

    # The compiler counts its compilations by code, and gives up on one that it has compiled eight times. Each of ours
    # has a code of its own, so that other losses do not count here.
    own = types.FunctionType(step.__code__.replace(), step.__globals__, step.__name__, None, step.__closure__)
    return torch.compile(own, fullgraph=True)


def _ordered(state: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
    """A state with its entries in the order of another one, which says what each of its tensors is.

    One with other entries stays as it is: it has another length, or is refused when it is restored.
    """
    if state.keys() != like.keys():
        return state
    return {k: _ordered(state[k], v) if isinstance(v, dict) else state[k] for k, v in like.items()}


def _is_pure(rule: StepRule) -> bool:
    """Whether all that a step changes is in the state which the rule has from its first step on.

    Not so of a C that is kept for several steps; and nobody knows of a class of a user's own that has attributes,
    unless it says by ``initial_state``.
    """
    return (
        rule.curvature.refresh_every == 1
        and _says_its_state(rule.curvature, "step")
        and _says_its_state(rule.damping, "value")
    )


def _says_its_state(own: Curvature | Damping, method: str) -> bool:
    made = next(base for base in type(own).__mro__ if method in base.__dict__)
    of_ours = made.__module__.startswith(_OURS)
    return of_ours or not vars(own) or holds(type(own), "initial_state", method)


def _extremes(structure: str, matrix: Tensor | None, squared: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest eigenvalue of C, for people."""
    if matrix is not None:
        return {"isotropic": Isotropic, "diagonal": Diagonal}.get(structure, Dense)(matrix).extremes()
    if structure == "per_sample":
        return (squared.new_zeros(()) if features > 1 else squared.min()), squared.max()
    unknown = squared.new_full((), torch.nan)
    return unknown, unknown
