"""Which dimension of a tensor counts the samples, where the graph tells that it is not the first.

Three things tell. A *stack* of several layers' outputs has a dimension that counts layers, and so have the outputs of
layers whose parameters were stacked (``torch.vmap`` over an ensemble, ``torch.bmm``). A *loss* of torch's own may have
its samples elsewhere: CTC has them second. And outputs of one dimension may be the features of one sample.

An axis is a dimension, or ``ONE_SAMPLE``. Views and permutations are followed where they leave the axis whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence, Set

from torch.autograd.graph import Node

from newton_plugin._boundary.autograd_graph import Edge, children, edge_shape, is_leaf, operation
from newton_plugin._boundary.layers import Layers

__all__ = [
    "ONE_SAMPLE",
    "TRANSPOSITIONS",
    "axis_after",
    "axis_of_layer",
    "features_of",
    "stacking_dimension",
    "told_by",
]

ONE_SAMPLE = -1
TRANSPOSITIONS = frozenset(("Permute", "T", "Transpose"))
_RECURRENT = frozenset(("CudnnRnn", "MiopenRnn", "MkldnnRnnLayer"))
_TIME_FIRST = frozenset(("CtcLoss", "CudnnCtcLoss"))
_TELLING = _TIME_FIRST | {"NllLoss"}
_ELEMENTWISE = frozenset(
    ("LogSoftmax", "Softmax", "Clone", "Alias", "ToCopy", "Add", "Sub", "Mul", "Div", "LogSigmoid")
)


def features_of(axis: int, shape: Sequence[int]) -> tuple[int, ...] | None:
    """The dimensions that are features, given the one that counts samples; None: all but the first."""
    return None if axis == 0 else tuple(d for d in range(len(shape)) if d != axis)


def signed(number: int) -> int:
    """A dimension that PyTorch saved; negative ones are kept as if they were unsigned."""
    return number - 2**64 if number >= 2**63 else number


def permutation(node: Node, ndim: int) -> list[int] | None:
    """Of a transposition of ``ndim`` dimensions: which dimension of its input each dimension of its output is.

    None where it does not tell: a user's ``autograd.Function`` may have any name.
    """
    order = list(range(ndim))
    if operation(node) == "T":
        return order[::-1]
    if hasattr(node, "_saved_dims"):
        return [signed(d) % ndim for d in node._saved_dims]  # type: ignore[attr-defined]
    if hasattr(node, "_saved_dim0"):
        first, second = (signed(d) % ndim for d in (node._saved_dim0, node._saved_dim1))  # type: ignore[attr-defined]
        order[first], order[second] = second, first
        return order
    return None


def axis_after(node: Node, axis: int, before: tuple[int, ...], after: tuple[int, ...]) -> int | None:
    """The axis behind an operation that keeps all numbers; None: it is not whole any more, or not known."""
    if operation(node) in TRANSPOSITIONS:
        order = permutation(node, len(before))
        return axis if axis == ONE_SAMPLE else None if order is None else order.index(axis)
    if before == after:
        return axis
    if axis == ONE_SAMPLE:
        return 0 if after == (1, *before) else axis
    if axis == 0:
        # The first dimension counts the samples of a view, too. But one sample that is no batch any more stays one.
        return ONE_SAMPLE if len(before) == 2 and after == before[1:] and after[0] > 1 else 0
    ahead, length = math.prod(before[:axis]), before[axis]
    for d, size in enumerate(after):
        if size == length and math.prod(after[:d]) == ahead:
            return d
    return 0 if ahead == 1 or after[:1] == (ahead * length,) else None


def axis_of_layer(edge: Edge, layers: Layers) -> int:
    """The axis of what a layer returns.

    A recurrent kernel says whether time is first; oneDNN's has it first whatever it says. Its states (layers, N, H)
    have the samples second. A batched product (K, N, D) @ (K, D, C) applies K matrices to K batches; where one matrix
    was expanded to K, the K are samples.
    """
    node, index = edge
    name = operation(node)
    if name in _RECURRENT and len(edge_shape(edge)) == 3:
        return 0 if name != "MkldnnRnnLayer" and index == 0 and node._saved_batch_first else 1  # type: ignore[attr-defined]
    if name not in ("Bmm", "Baddbmm"):
        return 0
    left, right = node.next_functions[-2:]
    for factor, axis in ((right, 1), (left, 2)):
        child, index = factor
        if child is not None and layers.is_weight(child):
            return axis if _is_stacked((child, index)) else 0
    return 0


def _is_stacked(weight: Edge) -> bool:
    """Whether the first dimension of a weight (K, D, C) is one of the parameter, not made by expanding."""
    edge = weight
    while not is_leaf(edge[0]):
        inputs = list(children(edge[0]))
        if not inputs:
            break
        if operation(edge[0]) == "Expand" and edge_shape(inputs[0])[:1] != edge_shape(edge)[:1]:
            return False
        if len(edge_shape(inputs[0])) < 3 and operation(edge[0]) == "Unsqueeze":
            return False
        edge = inputs[0]
    return True


def stacking_dimension(edge: Edge) -> int | None:
    """The new dimension of a stack; None for any other tensor."""
    dim = getattr(edge[0], "_saved_dim", None) if operation(edge[0]) == "Stack" else None
    return None if dim is None else signed(dim) % len(edge_shape(edge))


def told_by(nodes: Iterable[Node], operations: Set[str]) -> dict[Edge, int]:
    """The axes that losses of torch's own tell, of the tensors from which their inputs were computed entry by entry.

    Args:
        nodes: of the loss.
        operations: the names of what they are.
    """
    told: dict[Edge, int] = {}
    if operations.isdisjoint(_TELLING):
        return told
    for node in nodes:
        first = operation(node) in _TIME_FIRST
        child, index = node.next_functions[0]
        if child is None or not (first or operation(node) == "NllLoss"):
            continue
        edge, ndim = (child, index), len(edge_shape((child, index)))
        axis = ONE_SAMPLE if ndim == 1 + first else 1
        if axis == 1 and not first:
            continue  # (N, C): the first dimension counts, as everywhere
        while axis is not None and not is_leaf(edge[0]):
            told[edge] = axis
            inputs = list(children(edge[0]))
            if len(inputs) != 1:
                break
            axis = _axis_before(edge, axis, inputs[0])
            edge = inputs[0]
    return told


def _axis_before(edge: Edge, axis: int, source: Edge) -> int | None:
    """The axis of the only tensor that ``edge`` was computed from, given that of ``edge``; None: not known."""
    before, after, name = edge_shape(source), edge_shape(edge), operation(edge[0])
    if name in TRANSPOSITIONS:
        order = permutation(edge[0], len(after))
        return axis if axis == ONE_SAMPLE else None if order is None else order[axis]
    if name == "Unsqueeze" and axis != ONE_SAMPLE and after == (*before[:axis], 1, *before[axis:]):
        return ONE_SAMPLE
    return axis if name in _ELEMENTWISE and before == after else None
