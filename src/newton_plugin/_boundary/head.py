"""The last layer below a boundary: its inputs, and the gradients at its outputs, from the live autograd graph.

Sample i's gradient at the weight of a linear layer is ``sum_p a_ip b_ip'``: b_ip is the layer's input at position p of
the sample, a_ip the gradient of the sample's loss at the layer's output there. The layer's node keeps the b. The a are
the gradients at the boundary, pushed through what lies between: nodes are functions from gradients to gradients, and
calling one frees nothing. Hooks of tensors in between are not run.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from newton_plugin._boundary.autograd_graph import Edge, edge_metadata, edge_shape, is_leaf, operation
from newton_plugin._boundary.axes import signed
from newton_plugin._boundary.head_layer import HeadLayer, head_layer
from newton_plugin._boundary.head_places import Move, Places, find_places
from newton_plugin._boundary.layers import Layers
from newton_plugin._boundary.operations import ELEMENTWISE
from newton_plugin._boundary.rows import RowLayout
from newton_plugin._errors import ShapeError

__all__ = ["Head", "find_head"]

# Operations that only move numbers, by a rule that shapes and these attributes tell. Those of ``operations.REARRANGE``
# that move them by an index are none of these: their rule would have to be read from the index at every step.
_MOVES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "T"), ()),
    "Permute": ("_saved_dims",),
    "Flip": ("_saved_dims",),
    "Transpose": ("_saved_dim0", "_saved_dim1"),
    "Slice": ("_saved_dim", "_saved_start", "_saved_end", "_saved_step"),
    "Select": ("_saved_dim", "_saved_index"),
    "Unbind": ("_saved_dim",),
    "Split": ("_saved_dim", "_saved_split_size"),
    "SplitWithSizes": ("_saved_dim", "_saved_split_sizes"),
}
# They hand on the gradient as it is, where the shape stays.
_SILENT = frozenset(("Alias", "Clone", "Expand"))
# Python Functions of torch's own that hand on each tensor: for a module's backward hooks, and for what DDP returns.
_HANDED_ON = frozenset(("BackwardHookFunction", "_DDPSink"))
# Of one dimension; each sees a sample as a whole.
_MIXING = frozenset(("Softmax", "LogSoftmax"))
# Functions of one tensor, entry by entry.
_UNARY = frozenset(("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Cos", "Cosh", "Sin", "Sinh", "Tan")) | {
    *("Tanh", "Erf", "Erfc", "Erfinv", "Exp", "Exp2", "Expm1", "Log", "Log1P", "Log2", "Log10", "Logit", "Neg"),
    *("Reciprocal", "Rsqrt", "Sqrt", "Sigmoid", "Relu", "NanToNum", "Clamp", "ClampMin", "ClampMax", "Celu", "Elu"),
    *("Gelu", "Silu", "Mish", "Softplus", "Hardtanh", "Hardsigmoid", "Hardswish", "LeakyRelu", "LogSigmoid"),
    *("Hardshrink", "Softshrink", "Threshold", "RreluWithNoise", "NativeDropout", "MaskedFill"),
}
_ENTRY_BY_ENTRY = ELEMENTWISE | _UNARY | _SILENT | {"ToCopy"}


class _Step(NamedTuple):
    """One operation between the outputs and the layer: which of its outputs and which of its inputs are followed."""

    node: Node
    output: int
    input: int

    def __call__(self, gradient: Tensor) -> Tensor:
        outputs = self.node._input_metadata  # type: ignore[attr-defined]
        gradients = [gradient]
        if len(outputs) > 1:  # zeros said in full: what a node puts in their place may be on another device
            gradients = [torch.zeros(list(o.shape), dtype=gradient.dtype, device=gradient.device) for o in outputs]
            gradients[self.output] = gradient
        result = self.node(*gradients)  # type: ignore[operator]
        return result[self.input] if isinstance(result, tuple) else result


class _Path(NamedTuple):
    """From the outputs down to a layer.

    Attributes:
        layer: the layer.
        steps: every operation in between that changes the gradient.
        moves: those that change the places of its entries.
        only_moves: whether the other steps at most cast.
        key: tells the moves and their shapes.
    """

    layer: HeadLayer
    steps: list[_Step]
    moves: list[Move]
    only_moves: bool
    key: Hashable


@dataclass(frozen=True, eq=False)
class Head:
    """The last layer below a boundary.

    Attributes:
        inputs: (N, P, d), what the layer was applied to at the P positions of each of the N samples; detached, in the
            dtype in which the layer kept it. Of a convolution: the patches, or, where these would be more than 2**22
            numbers, their centres alone (d channels), which is a part of the layer's weight, not all of it.
        features: k, the layer's outputs at a position.
    """

    inputs: Tensor
    features: int
    _layout: RowLayout = field(repr=False)
    _dtype: torch.dtype = field(repr=False)
    _path: _Path = field(repr=False)
    _places: Places = field(repr=False)

    def gradients(self, rows: Tensor) -> Tensor:
        """The gradients at the layer's outputs.

        Args:
            rows: (N, m) gradients at the boundary, in the rows of its layout; any floating dtype.

        Returns:
            (N, P, k), detached, in the dtype of ``rows``. A view of ``rows`` where nothing but views lies in between.

        Raises:
            ShapeError: rows of another shape.
            RuntimeError: a backward pass has freed what a function below the boundary had saved.
        """
        if rows.shape != (self._layout.rows, self._layout.features):
            raise ShapeError(
                f"rows must have the shape ({self._layout.rows}, {self._layout.features}) of the boundary's samples "
                f"and features; got {tuple(rows.shape)}. Pass the gradient through the boundary's layout first."
            )
        shape = (self._layout.rows, self._places.positions, self.features)
        gradient = rows.detach()
        if not self._layout.rows:
            return gradient.new_empty(shape)
        if self._path.only_moves and self._places.view is not None:
            sizes, strides = self._places.view
            gradient = gradient.to(self.inputs.device).contiguous().as_strided(sizes, strides)
            return gradient if sizes == shape else gradient.reshape(shape)
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            gradient = self._layout.from_rows(gradient.to(self._dtype))
            for step in self._path.steps:
                gradient = step(gradient)
            gradient = self._path.layer.by_position(gradient)
            return _in_order(gradient, self._places.order, shape).to(rows.dtype)


def find_head(edge: Edge, layout: RowLayout) -> Head | str:
    """The last layer below outputs.

    It is found where every operation between the two changes places (views, permutations, slices), acts entry by entry,
    or is a softmax over features of a sample; and where the layer is a product with a weight or a convolution. Nothing
    is run but what the layer's saved input needs to be read.

    Args:
        edge: the outputs.
        layout: their samples and features.

    Returns:
        The layer; or a string, why there is none, in plain English.
    """
    if not layout.features:
        return "there are no outputs"
    path = _walk(edge)
    if isinstance(path, str):
        return path
    if not layout.rows:  # other processes may have samples, and have to know the layer's widths
        none = path.layer.inputs.reshape(0, 1, path.layer.inputs.shape[-1])
        return Head(none, path.layer.features, layout, edge_metadata(edge).dtype, path, Places(1, None, None))
    layer, device = path.layer, path.layer.inputs.device
    places = find_places(layout, path.moves, layer.by_position, device, (layout, path.key, layer.channel, device))
    if isinstance(places, str):
        return places
    inputs = layer.inputs
    inputs = _in_order(inputs, places.order, (layout.rows, places.positions, inputs.shape[-1]))
    return Head(inputs, layer.features, layout, edge_metadata(edge).dtype, path, places)


def _in_order(by_position: Tensor, order: Tensor | None, shape: tuple[int, int, int]) -> Tensor:
    """(positions..., c) to (N, P, c)."""
    if order is not None:
        by_position = by_position.reshape(-1, shape[-1]).index_select(0, order)
    return by_position.reshape(shape)


def _walk(edge: Edge) -> _Path | str:
    """Down to the first layer, where one way leads there; a string: none does."""
    steps: list[_Step] = []
    moves: list[Move] = []
    key: list[Hashable] = []
    only_moves = True
    while True:
        node, output = edge
        if is_leaf(node):
            return "no linear layer makes these outputs, which were computed from a leaf of the graph"
        name = operation(node)
        if isinstance(node, BackwardCFunction):
            # Inputs and outputs are the same, but for tensors that need no gradient.
            if name in _HANDED_ON and len(node.next_functions) == len(node._input_metadata):  # type: ignore[attr-defined]
                edge = node.next_functions[output]  # type: ignore[assignment]
                if edge[0] is None or edge_shape(edge) != edge_shape((node, output)):
                    return f"{node.name()} does not show what it hands on"
                continue
            return f"{node.name()} does not show what it computes"
        layer = head_layer(node)
        if isinstance(layer, str):
            return layer
        if layer is not None:
            key.append(edge_shape(edge))
            return _Path(layer, steps, moves, only_moves, tuple(key))
        if name in _MOVES:
            step = _Step(node, output, 0)
            steps.append(step)
            moves.append(step)
            told = [getattr(node, attribute) for attribute in _MOVES[name]]
            key.append((name, output, edge_shape(edge), *(tuple(v) if isinstance(v, list) else v for v in told)))
            edge = node.next_functions[0]  # type: ignore[assignment]
            continue
        if name not in _ENTRY_BY_ENTRY and name not in _MIXING:
            return f"no linear layer makes these outputs ({node.name()})"
        place = _followed(node)
        if isinstance(place, str):
            return place
        below: Edge = node.next_functions[place]  # type: ignore[assignment]
        shape = edge_shape(edge)
        if edge_shape(below) != shape:
            return f"{node.name()} changes the shape of what the last layer makes"
        if name in _MIXING:
            dimension = signed(node._saved_dim) % max(len(shape), 1)  # type: ignore[attr-defined]
            moves.append(dimension)
            key.append((name, dimension))
        if not (name in _SILENT or (name in ("Add", "Sub") and place == 0)):
            steps.append(_Step(node, output, place))
            only_moves = only_moves and name == "ToCopy"
        edge = below


def _followed(node: Node) -> int | str:
    """Which input of an operation the layer made: the only one that is not computed from parameters alone."""
    places = [place for place, (child, _) in enumerate(node.next_functions) if child is not None]
    if len(places) > 1:
        layers = Layers()
        made = [place for place in places if not layers.is_parameter(node.next_functions[place][0])]  # type: ignore[arg-type]
        if len(made) > 1:
            return f"{node.name()} joins {len(made)} tensors, and more than one may come from a layer"
        places = made or places[:1]
    return places[0]
