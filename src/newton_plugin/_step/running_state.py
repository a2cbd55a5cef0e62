"""What a rule keeps from step to step: curvature, damping, gain and counters; saved, loaded, handed in and out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from newton_plugin._curvature.damping import Damping
from newton_plugin._curvature.head_sums import HeadRows
from newton_plugin._curvature.protocol import Curvature
from newton_plugin._derivatives.sample_hessians import SampleHessians
from newton_plugin._errors import ArgumentError
from newton_plugin._linalg.damped_inverse import working_dtype
from newton_plugin._runtime.processes import finish_exchanges
from newton_plugin._step.size import Gain

__all__ = ["RunningState", "filled"]


@dataclass
class RunningState:
    """The part of a :class:`newton_plugin._step.rule.StepRule` that lives longer than a step.

    Attributes:
        curvature: from gradients to steps.
        damping: what is added to C.
        gain: how much longer the rule made the last gradients; kept where a loss has one size for several boundaries.
        summed: sums over all ranks of the last batch, where ``sync="lagged"`` uses them at the next; see ``lagged.py``.
        explicit: whether the running state is an argument and a result of the step (:meth:`restore`, :meth:`tensors`).
            The rule then changes none of these tensors, and warns of nothing that only their numbers show.
    """

    curvature: Curvature
    damping: Damping
    gain: Gain = field(default_factory=Gain)
    summed: Tensor | None = None
    explicit: bool = False
    _taken_over: tuple[list[Tensor], TreeSpec] | None = None  # a newer state than that of the other attributes
    _made_for: tuple[bool, bool] = (False, False)  # whether their form is one with a last layer; for SGD
    _structural_fallbacks: int = 0
    _gradients_not_stepped: Tensor | None = None
    _zero_hessians: Tensor | None = None

    @property
    def relative(self) -> bool:
        """Whether the steps have a size of their own: the damping goes with C."""
        return self.damping.needs_scale

    def state_dict(self) -> dict[str, Any]:
        """Running means and counters, as plain types and tensors."""
        finish_exchanges()  # with sync="lagged", the sums of the last step
        self.settle()
        gain = self.gain.state_dict()
        return {
            "curvature": self.curvature.state_dict(),
            "damping": self.damping.state_dict(),
            **({"gain": gain} if gain else {}),
            **({} if self.summed is None else {"summed": self.summed}),
            "structural_fallbacks": self._structural_fallbacks,
            "kept": _copied(self._gradients_not_stepped),
            "zero": _copied(self._zero_hessians),
        }

    def initial_state(
        self,
        gradient: Tensor,
        groups: int = 1,
        hessians: SampleHessians | None = None,
        head: HeadRows | None = None,
    ) -> dict[str, Any]:
        """The running state before the first step, as :meth:`tensors` gives it after one.

        Args:
            gradient: rows like those of the steps; only shape, dtype and device matter.
            groups: rows of one sample.
            hessians: of a batch; see :meth:`Curvature.initial_state`.
            head: the last layer of such a batch; None: it is not seen.
        """
        like = gradient.new_zeros(gradient.shape, dtype=working_dtype(gradient.device))
        # Of the rows, so that under vmap each member has its own.
        count = gradient.new_zeros((), dtype=torch.int64)
        more = {"head": head} if self.curvature.takes_head else {}
        return {
            "curvature": self.curvature.initial_state(like, self.damping, groups, hessians, **more),
            "damping": self.damping.initial_state(like),
            "gain": {"last": like.new_zeros(())} if self.relative else {},
            "kept": count,
            "zero": gradient.new_zeros((), dtype=torch.int64),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`tensors`, or from :meth:`initial_state`. Nothing is checked and nothing is copied."""
        self.curvature.load_state_dict(state["curvature"])
        self.damping.load_state_dict(state["damping"])
        self.gain.load_state_dict(state["gain"])
        self._gradients_not_stepped, self._zero_hessians = state["kept"], state["zero"]
        self.explicit = True

    def leaves(self, gradient: Tensor, groups: int, head: HeadRows | None = None) -> tuple[list[Tensor], TreeSpec]:
        """The tensors of :meth:`tensors`, from :meth:`initial_state` where nothing has come yet; and their form."""
        sees, memoryless = head is not None, self.curvature.memoryless
        if self._taken_over is not None and self._made_for in ((True, memoryless), (sees, memoryless)):
            return self._taken_over
        state = self.tensors()
        made = filled(self.initial_state(gradient, groups, head=head), state)
        if self.curvature.takes_head:  # what was learnt of other batches stays
            made["curvature"] = dict(sorted({**state["curvature"], **made["curvature"]}.items()))
        self._made_for = sees, memoryless
        return tree_flatten(made)

    def take_over(self, leaves: list[Tensor], form: TreeSpec) -> None:
        """Keep the state after a step that somebody else has taken from :meth:`leaves`."""
        self._taken_over = leaves, form

    def settle(self) -> None:
        """Bring a state that was taken over to where it belongs."""
        if self._taken_over is not None:
            leaves, form = self._taken_over
            self._taken_over = None
            self.restore(tree_unflatten(leaves, form))
            self.explicit = False

    def tensors(self) -> dict[str, Any]:
        """The running state as tensors in dictionaries: what :meth:`restore` takes."""
        self.settle()
        return {
            "curvature": self.curvature.state_dict(),
            "damping": self.damping.state_dict(),
            "gain": self.gain.state_dict(),
            "kept": self._gradients_not_stepped,
            "zero": self._zero_hessians,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """Load into copies first: what fails there would fail later, at a step.

        Raises:
            ArgumentError: see :meth:`load_state_dict`.
        """
        for kind, rule in (("curvature", self.curvature), ("damping", self.damping)):
            trial = copy.deepcopy(rule)
            try:
                trial.load_state_dict(state[kind])
                same = trial.state_dict().keys() == state[kind].keys()
            except (AttributeError, KeyError, TypeError):
                same = False
            if not same:
                raise ArgumentError(
                    f"state was not saved with {kind}={rule!r}: its entries are others. Load a state with the settings "
                    "that it was saved with, or begin without it."
                )
            if not _means_are_finite(state[kind]):
                raise ArgumentError(
                    "state holds a running mean that is not finite, which every later step would have. Begin without "
                    "it."
                )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave.

        Raises:
            ArgumentError: a state of another curvature or damping, or one that is not finite. Nothing is changed.
        """
        self.check_state(state)
        self.curvature.load_state_dict(state["curvature"])
        self.damping.load_state_dict(state["damping"])
        self.gain.load_state_dict(state.get("gain", {}))
        self.summed = state.get("summed")
        self._structural_fallbacks, self._taken_over = state["structural_fallbacks"], None
        self._gradients_not_stepped, self._zero_hessians = _copied(state["kept"]), _copied(state["zero"])


def filled(
    fresh: dict[str, Any], state: dict[str, Any], taken: Callable[[str, Tensor, Any], Any] = lambda *names: names[2]
) -> dict[str, Any]:
    """``fresh``, with what ``state`` has of it: ``taken(name, what fresh has, what state has)``."""
    made = {}
    for name, value in fresh.items():
        given = state.get(name)
        if isinstance(value, dict):
            made[name] = filled(value, given if isinstance(given, dict) else {}, taken)
        else:
            made[name] = value if given is None else taken(name, value, given)
    return made


def _means_are_finite(state: dict[str, Any]) -> bool:
    """Whether every running mean in a state is finite, which :class:`RunningMean` always is."""
    mean = state.get("mean")
    if isinstance(mean, Tensor) and not bool(torch.isfinite(mean).all()):
        return False
    return all(_means_are_finite(part) for part in state.values() if isinstance(part, dict))


def _copied(count: Tensor | None) -> Tensor | None:
    return None if count is None else count.clone()
