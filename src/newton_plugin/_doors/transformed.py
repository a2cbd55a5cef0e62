"""A wrapped loss under the transforms of torch.func: the pure engine, with a state for each member of a ``vmap``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from newton_plugin._derivatives.functional import Differentiated
from newton_plugin._doors.layer_names import MAX_LAYERS
from newton_plugin._errors import TransformError
from newton_plugin._runtime.members import Shelf, keep, kept
from newton_plugin._runtime.processes import current_ranks
from newton_plugin._runtime.transforms import has_tangent, in_chunks, kinds_of_transforms
from newton_plugin._step.pure import preconditioned, pure_steps
from newton_plugin._step.settings import RuleSettings
from newton_plugin._step.states import RuleState, initial_states, layout_in

__all__ = ["MemberStates", "needs_pure_engine", "transformed_loss"]


def needs_pure_engine(outputs: Sequence[Tensor]) -> bool:
    """Whether the running code differentiates by a transform of torch.func or in forward mode."""
    kinds = kinds_of_transforms()
    if "Jvp" in kinds or any(has_tangent(y) for y in outputs):
        return True
    return bool(kinds) and torch.is_grad_enabled()  # without gradients nothing is trained, also inside of grad


class MemberStates:
    """The running states of a wrapped loss under transforms: by argument and width, for each member of a ``vmap``."""

    def __init__(self) -> None:
        self._shelves: dict[tuple[str, int], Shelf] = {}

    def shelf(self, name: str, features: int) -> Shelf:
        """Where the states of one argument are; of outputs of one width."""
        key = (name, features)
        while key not in self._shelves and len(self._shelves) >= MAX_LAYERS:
            self._shelves.pop(next(iter(self._shelves)))
        return self._shelves.setdefault(key, Shelf())

    def __len__(self) -> int:
        return len(self._shelves)

    @property
    def fallbacks(self) -> int:
        """Steps so far that were not taken, or that Fisher took, of all members. Waits for the device."""
        # The two counts come last in a state.
        return sum(int(count.sum()) for shelf in self._shelves.values() for count in (shelf.last or [])[-2:])


def transformed_loss(
    loss_of: Callable[[Sequence[Tensor]], Tensor],
    outputs: dict[str, Tensor],
    settings: RuleSettings,
    members: MemberStates,
) -> Tensor:
    """The loss, whose derivative by ``outputs`` is the step, under any transforms.

    Raises:
        TransformError: there are several processes, whose C no collective can average here; ``vmap`` takes the members
            in chunks.
    """
    if in_chunks():
        raise TransformError(
            "vmap(chunk_size=...) calls a wrapped loss once for each chunk, whose members would go on from the running "
            "state of the chunk before. Leave chunk_size out, or use npl.functional.newton_loss, whose state is an "
            "argument."
        )
    if current_ranks(settings.sync).many:
        raise TransformError(
            "sync=True averages C over the processes, which the transforms of torch.func do not let it do. Pass "
            "sync=False: each process takes the C of its own samples."
        )
    stopped = {name: y.detach() for name, y in outputs.items()}
    shelves = [members.shelf(name, layout_in(y, settings).features) for name, y in outputs.items()]
    anchors: list[Tensor] = []

    def states(derived: Differentiated) -> list[RuleState]:
        found = []
        fresh = initial_states(stopped, settings, derived.hessians)
        for shelf, state, gradient in zip(shelves, fresh, derived.gradients, strict=True):
            leaves, form = tree_flatten(state)
            anchors.append(gradient)
            found.append(tree_unflatten(kept(shelf, gradient, leaves), form))
        return found

    taken = pure_steps(loss_of, stopped, states, settings)
    for shelf, state, gradient in zip(shelves, taken.states, anchors, strict=True):
        keep(shelf, gradient, tree_flatten(state)[0])
    return preconditioned(taken, list(outputs.values()))
