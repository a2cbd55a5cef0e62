"""One name for each layer, so that a layer finds its running state again whatever else the same door sees."""

from __future__ import annotations

from collections.abc import Hashable

__all__ = ["MAX_LAYERS", "LayerNames"]

MAX_LAYERS = 64  # of one door: layers that are made anew all the time would be collected without end


class LayerNames:
    """Names of layers: always the same for one layer, and another for each layer.

    A layer is known by the parameters that it applies, so the names hold for the objects of this process. A copy of a
    door meets the copies of the layers as new ones, in the same order, and gives them the same names.
    """

    def __init__(self) -> None:
        self._names: dict[Hashable, str] = {}

    def __getstate__(self) -> dict[str, object]:
        return {"_names": {}}

    def of(self, layer: Hashable | None, wanted: str, at_once: int = 1) -> str:
        """The name of ``layer``: ``wanted``, or with a number if another layer has that; None is no layer.

        Args:
            layer: what is the same at each of its calls.
            wanted: what it would be called alone.
            at_once: how many layers one loss has. So many are kept, whatever the limit.
        """
        if layer is None:
            return wanted
        if layer not in self._names:
            while len(self._names) >= max(MAX_LAYERS, 4 * at_once):
                self._names.pop(next(iter(self._names)))
            taken = set(self._names.values())
            name, number = wanted, 1
            while name in taken:
                number += 1
                name = f"{wanted}@{number}"
            self._names[layer] = name
        return self._names[layer]
