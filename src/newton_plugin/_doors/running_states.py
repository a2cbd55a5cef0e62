"""The running states of a hook: one rule for each layer, found again at every loss and in every checkpoint."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from newton_plugin._boundary.autograd_graph import Boundary
from newton_plugin._doors.layer_names import MAX_LAYERS, LayerNames
from newton_plugin._step.ends import layout_at
from newton_plugin._step.rule import StepRule
from newton_plugin._step.settings import RuleSettings

__all__ = ["RunningStates"]


class RunningStates:
    """Rules by key. A key is the name of a layer, of the loss if that has one, and of the width where C depends on it.

    Attributes:
        rules: by key.
        memoryless: whether the optimizer is known to remember no gradients.
        in_turn: whether different losses have had different boundaries.
    """

    def __init__(self, settings: RuleSettings) -> None:
        self.rules: dict[str, StepRule] = {}
        self.in_turn = False
        self.memoryless = False
        self._by_position: list[str] = []  # keys that were loaded and stand for the first layers that come
        self._settings = settings
        self._names = LayerNames()
        curvature = settings.build().curvature
        # C has another shape for outputs of another width, so that each width has its own.
        self._by_width = curvature.structure not in ("isotropic", "per_sample") or curvature.refresh_every > 1

    @property
    def go_by_order(self) -> bool:
        """Whether states without names of layers, of different losses, would go to the layers by their order."""
        nameless = {key.rpartition("/")[2] for key in self.rules}
        return self.in_turn and sum(key.startswith("output") for key in nameless) > 1

    def keys_of(self, boundaries: Sequence[Boundary], loss: str) -> list[str]:
        """The key of each boundary of a loss. Calls of one layer share theirs."""
        keys: list[str] = []
        callers: dict[str, Hashable] = {}
        for boundary in boundaries:
            layout = layout_at(boundary, self._settings)
            key = self._names.of(boundary.layer, boundary.name, len(boundaries))
            if self._by_width:
                key += f":{layout.features}"
            if loss:
                key = f"{loss}/{key}"
            # Structure "block" has a C for each position, so calls of different lengths are told apart as well.
            caller = None if boundary.layer is None else (boundary.layer, layout.features, layout.groups)
            if key in callers and (caller is None or callers[key] != caller):
                key = f"{key}#{1 + sum(k.partition('#')[0] == key for k in callers)}"
            callers[key] = caller
            keys.append(key)
        return keys

    def of(self, keys: Sequence[str]) -> list[StepRule]:
        """The rules of one loss, made where there is none yet; so many are kept, whatever the limit."""
        for key in dict.fromkeys(keys) if self._by_position else ():
            if key not in self.rules and self._by_position:
                self.rules[key] = self.rules.pop(self._by_position.pop(0))
        most = max(MAX_LAYERS, 4 * len(keys))
        for key in keys:
            while key not in self.rules and len(self.rules) >= most:  # outputs whose width changes all the time
                self.rules.pop(next(iter(self.rules)))
            if key not in self.rules:
                self.rules[key] = self._settings.build()
            self.rules[key].curvature.memoryless = self.memoryless
        self.in_turn = self.in_turn or len(self.rules) > len(set(keys))
        return [self.rules[key] for key in keys]

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        rules = {key: rule.state_dict() for key, rule in self.rules.items()}
        waiting = {"by_position": True} if self._by_position else {}
        return {"rules": rules, "in_turn": self.in_turn, **waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; where a part of it does not fit, nothing is changed.

        A state of ``npl.functional`` names arguments and not layers: it says ``by_position``, and goes to the layers in
        the order in which the next loss has them.
        """
        rules = {key: self._settings.build() for key in state["rules"]}
        for key, rule in rules.items():
            rule.load_state_dict(state["rules"][key])
        self.rules, self.in_turn, self._names = rules, state.get("in_turn", False), LayerNames()
        self._by_position = list(rules) if state.get("by_position") else []
