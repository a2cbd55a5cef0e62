r"""Hessians in closed form, found in the graph of a loss that has been computed: no second differentiation.

With respect to the outputs y of one sample (p = softmax(y), s = sigmoid(y), G the gradient that reaches the operation):

* ``log_softmax``, and anything *linear* after it: ``a (diag(p) - p p')`` with ``a = -sum_k G_k``. That is cross-entropy
  in all its variants: class indices or probabilities, weights, ``ignore_index``, label smoothing, a constant in front.
* ``mse_loss``: ``2 G I``, divided by the number of elements where the loss is their mean;
* ``binary_cross_entropy_with_logits``: ``diag(G w s (1 - s) (pos_weight t + 1 - t))``;
* a loss that brings its own Hessian: :func:`with_hessian`.

Each holds where every path from the loss to the outputs leads through that operation, and the operations between it and
the loss are linear. Then the second derivative of the whole is the operation's own, weighted by G.

A new closed form for an operation of torch is one function here and one line in ``_OPERATIONS``. A loss of your own
says what its Hessian is by :func:`with_hessian`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from newton_plugin._boundary.autograd_graph import (
    Boundary,
    Edge,
    edge_shape,
    known_hessian,
    mark_hessian,
    operation,
    upstream_edges,
)
from newton_plugin._boundary.rows import RowLayout
from newton_plugin._derivatives.sample_hessians import HVP, SampleHessians
from newton_plugin._errors import ArgumentTypeError, NoGradientError, ShapeError
from newton_plugin._linalg.damped_inverse import working_dtype
from newton_plugin._linalg.diagonal_rank_one import DiagonalRankOne

__all__ = ["ClosedForm", "find_closed_form", "with_hessian"]

# Operations whose second derivative is zero, whatever constants they hold.
_LINEAR = frozenset(("Add", "Alias", "Cat", "Clone", "Div", "Expand", "Index", "MaskedFill", "Mean", "Mul", "Neg")) | {
    *("NllLoss", "NllLoss2D", "Permute", "ReshapeAlias", "Select", "Slice", "Squeeze", "Stack", "Sub", "Sum", "T"),
    *("ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View", "Where"),
}
_NONE, _MEAN = 0, 1  # torch's codes of a reduction
_BLOCK_ELEMENTS = 2**25  # of (N, m, m), 256 MiB: larger blocks are not formed where a loss has products as well


@dataclass(frozen=True)
class ClosedForm:
    """The Hessian at one boundary, in closed form.

    Attributes:
        node: the operation. The gradient that arrives at it in a backward pass is the argument of :attr:`hessians`.
        hessians: from that gradient, in the scale of ``g_i``, to the samples' Hessians. Holds tensors, no graph.
    """

    node: Node
    hessians: Callable[[Tensor], SampleHessians]


def with_hessian(loss: Tensor, outputs: Tensor, blocks: Callable[[], Tensor], *, products: HVP | None = None) -> Tensor:
    """Say what the Hessian of a loss is, so that ``curvature="hessian"`` need not differentiate twice.

    Call it where your loss function has computed ``loss`` from ``outputs``. It costs nothing until a Newton step asks.

    Args:
        loss: one number, or one for each sample (N,); with its graph.
        outputs: (N, ...), m features a sample: what ``loss`` was computed from, with its graph. The samples must not
            depend on one another.
        blocks: gives (N, m, m): the second derivatives of ``loss`` (of its i-th entry, if it is one for each sample)
            with respect to each sample's outputs, as they were when the loss was computed. For a mean over N samples
            the 1/N is in it. Let it refer to detached tensors only.
        products: gives ``H_i v_i`` of the same matrices, (K, N, m) -> (K, N, m): K vectors for every sample. Called in
            place of ``blocks`` where those would take more than 256 MiB.

    Returns:
        ``loss``.

    Raises:
        ShapeError: ``loss`` is neither one number nor one for each sample.

    Example:
        >>> import torch, newton_plugin as npl
        >>> def quartic(y):
        ...     at = y.detach()
        ...     return npl.with_hessian((y**4).sum(), y, lambda: torch.diag_embed(12 * at**2))
        >>> y = torch.tensor([[1.0, 2.0]])
        >>> npl.newton_step(quartic, y, curvature="hessian", damping=1e-9, reduction="sum").step
        tensor([[0.3333, 0.6667]])
    """
    for name, tensor in (("loss", loss), ("outputs", outputs)):
        if not isinstance(tensor, Tensor):
            raise ArgumentTypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}.")
    if not callable(blocks):
        raise ArgumentTypeError(f"blocks must be a function without arguments; got {type(blocks).__name__}.")
    if not (products is None or callable(products)):
        raise ArgumentTypeError(f"products must be a function of vectors or None; got {type(products).__name__}.")
    if outputs.ndim == 0 or (loss.numel() != 1 and tuple(loss.shape) != (outputs.shape[0],)):
        raise ShapeError(
            "loss must be one number or one for each sample (N,) of outputs (N, ...); got shapes "
            f"{tuple(loss.shape)} and {tuple(outputs.shape)}."
        )
    if not torch.is_grad_enabled() or not outputs.requires_grad:
        return loss  # evaluation: no Newton step will ask
    if loss.grad_fn is None:
        raise NoGradientError("loss has no autograd graph though outputs require grad: was it detached?")
    edge = get_gradient_edge(outputs)
    mark_hessian(loss.grad_fn, (edge.node, edge.output_nr), _Provided(blocks, products))
    return loss


@dataclass(frozen=True)
class _Provided:
    """What :func:`with_hessian` was given; called, it is ``blocks``."""

    blocks: Callable[[], Tensor]
    products: HVP | None

    def __call__(self) -> Tensor:
        return self.blocks()


def find_closed_form(root: Node, boundary: Boundary, layout: RowLayout) -> ClosedForm | None:
    """The closed form at ``boundary`` of the loss whose graph begins at ``root``; None if there is none."""
    edge = boundary.graph_edge
    ends = _nonlinear_ends(root, edge)
    if len(ends) != 1:
        return None
    (node,) = ends
    known = known_hessian(node)
    if known is not None and known[0] == edge:
        return ClosedForm(node, _provided(known[1], layout))
    hessians_of = _OPERATIONS.get(operation(node))
    if hessians_of is None or not _is_builtin(node) or [e for e in node.next_functions if e[0] is not None] != [edge]:
        return None
    try:
        hessians = hessians_of(node, layout)
    except RuntimeError:  # a saved tensor was freed, or changed in place
        return None
    return None if hessians is None else ClosedForm(node, hessians)


def _nonlinear_ends(root: Node, edge: Edge) -> list[Node]:
    """The first operations, seen from the loss, that are not linear and that ``edge`` leads to."""
    ends, stack, seen = [], [root], {root}
    while stack:
        node = stack.pop()
        known = known_hessian(node)
        if known is not None and known[0] == edge:
            ends.append(node)
        elif _is_linear(node):
            for child, index in node.next_functions:
                if child is not None and (child, index) != edge and child not in seen:
                    seen.add(child)
                    stack.append(child)
        elif upstream_edges((node, 0), [edge]):
            ends.append(node)
    return ends


def _is_builtin(node: Node) -> bool:
    """Whether the operation is one of torch: a user's Function may have the same name."""
    return node.name()[-1:].isdigit()


def _is_linear(node: Node) -> bool:
    name = operation(node)
    if name not in _LINEAR or not _is_builtin(node):
        return False
    if name not in ("Mul", "Div"):
        return True
    factors = [child is not None for child, _ in node.next_functions]
    return sum(factors) == 1 and (name == "Mul" or factors[0])  # constant / y is not linear


def _provided(blocks: Callable[[], Tensor], layout: RowLayout) -> Callable[[Tensor], SampleHessians]:
    products: HVP | None = getattr(blocks, "products", None)
    wanted = (layout.rows, layout.features, layout.features)

    def check(shape: tuple[int, ...]) -> None:
        if shape != wanted:
            raise ShapeError(
                f"blocks must give (N, m, m) = {wanted} for these outputs; got shape {shape}. "
                f"feature_dims={layout.feature_dims} makes the samples."
            )

    def hessians(upstream: Tensor) -> SampleHessians:
        weight = upstream.reshape(-1, 1, 1) if upstream.numel() > 1 else upstream.reshape(())

        def weighted() -> Tensor:
            own = blocks().detach()
            check(tuple(own.shape))
            return own.to(weight.dtype) * weight

        if products is None or math.prod(wanted) <= _BLOCK_ELEMENTS:
            return SampleHessians.of_blocks(weighted)
        check((layout.shape[0], *[math.prod(layout.shape[1:])] * 2))
        each, of_each = products, weight.reshape(-1, 1)
        return SampleHessians(lambda v: each(v).to(of_each.dtype) * of_each, independent=True)

    return hessians


def _log_softmax(node: Node, layout: RowLayout) -> Callable[[Tensor], SampleHessians] | None:
    result: Tensor = node._saved_result.detach()  # type: ignore[attr-defined]
    dim = node._saved_dim % 2**64  # type: ignore[attr-defined]
    dim = dim - 2**64 + result.ndim if dim > 2**63 else dim  # torch shows -1 as 2^64 - 1
    if layout.feature_axes != (dim,):
        return None
    # Not exp(result): probabilities rounded to float32, with a sum above 1, would give H a negative eigenvalue.
    probability = torch.softmax(layout.to_rows(result).to(working_dtype(result.device)), -1)

    def hessians(upstream: Tensor) -> SampleHessians:
        weight = -layout.to_rows(upstream).sum(-1)
        return SampleHessians.of_rank_one(DiagonalRankOne(weight.unsqueeze(-1) * probability, weight, probability))

    return hessians


def _squared_error(node: Node, layout: RowLayout) -> Callable[[Tensor], SampleHessians] | None:
    return _elementwise(node, layout, lambda y: torch.full_like(y, 2.0))


def _binary_cross_entropy(node: Node, layout: RowLayout) -> Callable[[Tensor], SampleHessians] | None:
    def second(y: Tensor) -> Tensor:
        s = torch.sigmoid(y)
        second = s * (1 - s)
        target, weight, positive = (getattr(node, f"_saved_{name}") for name in ("target", "weight", "pos_weight"))
        if positive is not None:
            second = second * (positive.to(y) * target + 1 - target)
        return second if weight is None else second * weight.to(y)

    return _elementwise(node, layout, second)


def _elementwise(
    node: Node, layout: RowLayout, second: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], SampleHessians] | None:
    """Of a loss that is a sum or mean over elements, from the second derivative of one element."""
    outputs: Tensor = node._saved_self.detach()  # type: ignore[attr-defined]
    reduction = node._saved_reduction  # type: ignore[attr-defined]
    if tuple(outputs.shape) != layout.shape or edge_shape((node, 0)) != (layout.shape if reduction == _NONE else ()):
        return None
    diagonal = second(outputs.to(working_dtype(outputs.device)))
    if reduction == _MEAN:
        diagonal = diagonal / max(1, outputs.numel())
    rows = layout.to_rows(diagonal)

    def hessians(upstream: Tensor) -> SampleHessians:
        weight = layout.to_rows(upstream) if reduction == _NONE else upstream
        return SampleHessians.of_rank_one(DiagonalRankOne(rows * weight))

    return hessians


_OPERATIONS: dict[str, Callable[[Node, RowLayout], Callable[[Tensor], SampleHessians] | None]] = {
    "LogSoftmax": _log_softmax,
    "MseLoss": _squared_error,
    "BinaryCrossEntropyWithLogits": _binary_cross_entropy,
}
