"""The last layer below the boundaries of one layer's calls, for rules that look at it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from newton_plugin._boundary.autograd_graph import Boundary
from newton_plugin._boundary.head import Head, find_head
from newton_plugin._boundary.rows import RowLayout
from newton_plugin._curvature.head_sums import HeadRows
from newton_plugin._errors import ShapeError

__all__ = ["UNSEEN", "GivenHead", "LayerHead", "LinearHead", "head_of"]

UNSEEN = "samples are not evened out: "


class LayerHead:
    """The last layer of all calls of one layer.

    Args:
        heads: of each call.
        sizes: rows of each call.
    """

    def __init__(self, heads: Sequence[Head], sizes: Sequence[int]) -> None:
        self._heads, self._sizes = heads, sizes

    @property
    def widths(self) -> str:
        """What several processes have to agree on."""
        return f"{self._heads[0].inputs.shape[-1]} inputs and {self._heads[0].features} outputs"

    def __str__(self) -> str:
        positions = self._heads[0].inputs.shape[1]
        return f"a layer of {self.widths}" + (f" at {positions} positions" if positions > 1 else "")

    def rows(self, rows: Tensor) -> HeadRows | None:
        """What a rule gets with the rows (N, m) of all calls; None where calls differ in their positions.

        Args:
            rows: gradients, in the unit in which the rule gets them.
        """
        parts = rows.split(list(self._sizes)) if len(self._sizes) > 1 else [rows]
        found = [HeadRows(head.gradients(part), head.inputs) for head, part in zip(self._heads, parts, strict=True)]
        return HeadRows.joined(found)


class LinearHead(LayerHead):
    """A linear layer that made the outputs from inputs that are given, (N, ..., d): nothing lies in between.

    Raises:
        ShapeError: the outputs of a sample are no whole multiple of its positions.
    """

    def __init__(self, inputs: Tensor, layout: RowLayout) -> None:
        positions = inputs.numel() // max(1, layout.rows * inputs.shape[-1]) if inputs.ndim else 0
        fits = inputs.ndim > 1 and positions * layout.rows * inputs.shape[-1] == inputs.numel()
        if not layout.rows and fits:  # the other dimensions tell
            samples = math.prod([max(1, layout.shape[axis]) for axis in layout.sample_axes])
            positions = math.prod([max(1, size) for size in inputs.shape[:-1]]) // samples
        if not fits or not positions or layout.features % positions:
            raise ShapeError(
                f"layer_inputs must be (N, ..., d), the inputs of the layer that made the outputs, for {layout.rows} "
                f"samples with {layout.features} outputs each; got shape {tuple(inputs.shape)}."
            )
        self._inputs = inputs.detach().reshape(layout.rows, positions, inputs.shape[-1])
        self._features = layout.features // positions

    def rows(self, rows: Tensor) -> HeadRows | None:
        """Gradients at the outputs are gradients at the layer."""
        return HeadRows(rows.reshape(len(rows), self._inputs.shape[1], self._features), self._inputs)


class GivenHead(LayerHead):
    """One that is known: gradients (N, P, k) in the unit of the rows, and inputs (N, P, d)."""

    def __init__(self, gradients: Tensor, inputs: Tensor) -> None:
        self._given = HeadRows(gradients, inputs)

    def rows(self, rows: Tensor) -> HeadRows | None:
        """Whatever the rows."""
        return self._given


def head_of(boundaries: Sequence[Boundary], layouts: Sequence[RowLayout]) -> LayerHead | str:
    """Of the calls of one layer; a string: why none is seen."""
    heads = []
    for boundary, layout in zip(boundaries, layouts, strict=True):
        head = find_head(boundary.graph_edge, layout)
        if isinstance(head, str):
            return head
        heads.append(head)
    if len({head.inputs.shape[1:] for head in heads if len(head.inputs)}) > 1:
        return "calls of the last layer have different numbers of positions"
    return LayerHead(heads, [layout.rows for layout in layouts])
