"""What the last layer of a network was applied to, from the tensors that its node saved for the backward pass."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node

from newton_plugin._boundary.autograd_graph import children, edge_shape, is_leaf, operation
from newton_plugin._boundary.axes import axis_of_layer
from newton_plugin._boundary.layers import Layers
from newton_plugin._boundary.weights import Weights

__all__ = ["MOST_NUMBERS_IN_PATCHES", "HeadLayer", "head_layer"]

MOST_NUMBERS_IN_PATCHES = 2**22

# Which input of a product is the right factor, and the name under which the left one is saved.
_PRODUCTS = {
    "Mm": (1, "_saved_self"),
    "Addmm": (2, "_saved_mat1"),
    "Mv": (1, "_saved_self"),
    "Addmv": (2, "_saved_mat"),
    "Bmm": (1, "_saved_self"),
    "Baddbmm": (2, "_saved_batch1"),
}
_PLAIN = getattr(Tensor, "__torch_dispatch__")  # noqa: B009 - no type stubs
_FROZEN = "the weight of the last layer is frozen"


class HeadLayer(NamedTuple):
    """A layer as a linear map, the same at every position.

    Attributes:
        inputs: what it was applied to: its positions, in any number of dimensions, and the d numbers at each.
        channel: the dimension of its outputs that holds the features; the others are the positions. None: all are.
        features: k, the outputs at a position.
    """

    inputs: Tensor
    channel: int | None
    features: int

    def by_position(self, outputs: Tensor) -> Tensor:
        """What has the shape of the layer's outputs, with the features last: (positions..., k)."""
        return outputs.unsqueeze(-1) if self.channel is None else outputs.movedim(self.channel, -1)


def head_layer(node: Node) -> HeadLayer | str | None:
    """The layer of a node; a string, why its inputs are not to be had; None: the node is no layer of this kind."""
    name = operation(node)
    if name in _PRODUCTS:
        return _product(node, name)
    return _convolution(node) if name == "Convolution" else None


def _product(node: Node, name: str) -> HeadLayer | str:
    place, saved = _PRODUCTS[name]
    side = _side_of_weight(node, place)
    if side is None:
        frozen = node.next_functions[place][0] is None
        return _FROZEN if frozen else f"neither factor of the last layer is a weight ({node.name()})"
    shape = edge_shape((node, 0))
    if name in ("Bmm", "Baddbmm"):
        if side == "left":
            return f"the weight of the last layer is the left factor of {node.name()}"
        if shape[0] > 1 and axis_of_layer((node, 0), Layers()) != 0:
            return f"the last layer applies several weights ({node.name()})"
    if side == "left":  # y = w @ x: the columns of x are the positions
        if name != "Mm":
            return f"the weight of the last layer is the left factor of {node.name()}"
        inputs = _saved(node, "_saved_mat2")
        return inputs if isinstance(inputs, str) else HeadLayer(inputs.mT, 0, shape[0])
    inputs = _saved(node, saved)
    if isinstance(inputs, str):
        return inputs
    if name[:3] in ("Add", "Bad") and node._saved_alpha != 1:  # type: ignore[attr-defined]
        inputs = inputs * node._saved_alpha  # type: ignore[attr-defined]
    if name in ("Mv", "Addmv"):
        return HeadLayer(inputs, None, 1)
    return HeadLayer(inputs, len(shape) - 1, shape[-1])


def _side_of_weight(node: Node, place: int) -> str | None:
    """Which factor of a product is the weight: "right", "left" or None.

    Data that require grad may be leaves, too. A parameter goes before them, on whichever side it is.
    """
    left, right = node.next_functions[place - 1][0], node.next_functions[place][0]
    if right is not None and _is_plain(right):
        return "right"
    weights = Weights()
    right_is = right is not None and weights.is_weight(right)
    if right_is and _of_a_parameter(right):  # type: ignore[arg-type]
        return "right"
    if left is not None and weights.is_weight(left) and _of_a_parameter(left):
        return "left"
    return "right" if right_is else None


def _is_plain(node: Node) -> bool:
    """Whether a tensor is an ``nn.Parameter``, or one that ``nn.Linear`` transposed: at sight, as at every step."""
    if operation(node) == "T":
        (node, _), *_ = node.next_functions  # type: ignore[assignment]
    return is_leaf(node) and isinstance(node.variable, nn.Parameter)  # type: ignore[attr-defined]


def _of_a_parameter(weight: Node) -> bool:
    """Whether a weight was computed from an ``nn.Parameter``."""
    while not is_leaf(weight):
        weight = next(children(weight))[0]
    return isinstance(weight.variable, nn.Parameter)  # type: ignore[attr-defined]


def _convolution(node: Node) -> HeadLayer | str:
    if node._saved_transposed:  # type: ignore[attr-defined]
        return f"the last layer is a transposed convolution ({node.name()})"
    if node._saved_groups != 1:  # type: ignore[attr-defined]
        return f"the last layer is a convolution in groups ({node.name()})"
    child, index = node.next_functions[1]
    if child is None:
        return _FROZEN
    kernel, outputs = edge_shape((child, index))[2:], edge_shape((node, 0))
    stride = node._saved_stride  # type: ignore[attr-defined]
    inputs = _saved(node, "_saved_input")
    if isinstance(inputs, str):
        return inputs
    # One weight for each channel is a view of the inputs. Larger kernels copy them once for each of their entries.
    taps, channels = math.prod(kernel), inputs.shape[1]
    if taps == 1 or math.prod(outputs) // outputs[1] * channels * taps <= MOST_NUMBERS_IN_PATCHES:
        padding, dilation = node._saved_padding, node._saved_dilation  # type: ignore[attr-defined]
        return HeadLayer(_patches(inputs, kernel, stride, padding, dilation), 1, outputs[1])
    if set(stride) == {1} and all(size % 2 for size in kernel) and inputs.shape[2:] == outputs[2:]:
        return HeadLayer(inputs.movedim(1, -1), 1, outputs[1])
    return f"the last layer is a convolution whose inputs are too many to unfold ({node.name()})"


def _patches(
    inputs: Tensor, kernel: tuple[int, ...], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """(B, C, size...) to (B, places..., C * entries of the kernel): what each output was computed from."""
    if any(padding):
        inputs = F.pad(inputs, [p for p in reversed(padding) for _ in range(2)])
    n = len(kernel)
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        inputs = inputs.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
    return inputs.permute(0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n)).flatten(1 + n)


def _saved(node: Node, name: str) -> Tensor | str:
    """A tensor that a node saved, detached; a string, why it is not to be had."""
    try:
        hook = getattr(getattr(node, f"_raw{name}", None), "unpack_hook", None)  # not every torch shows it
        if getattr(hook, "__module__", None) == "torch.utils.checkpoint":
            return "the last layer is inside of a checkpoint, which would be computed once more for its input"
        saved = getattr(node, name)
    except RuntimeError as error:
        reason = "was freed" if "already been freed" in str(error) else "cannot be read any more"
        reason = "was changed in place" if "inplace operation" in str(error) else reason
        return f"the input of the last layer {reason} ({node.name()})"
    if saved is None:
        return _FROZEN
    if getattr(type(saved), "__torch_dispatch__") is not _PLAIN:  # noqa: B009 - no type stubs
        return f"the input of the last layer is no plain tensor ({type(saved).__name__})"
    return saved.detach()
