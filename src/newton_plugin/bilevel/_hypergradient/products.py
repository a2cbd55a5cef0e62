r"""Products of the lower loss's second derivatives with a vector v in the space of y.

Both blocks of the Hessian that a hypergradient needs multiply the *same* kind of vector::

    D2_yy G v = d/dy <grad_y G, v>          D2_xy G v = d/dx <grad_y G, v>

so one backward pass through the graph of ``grad_y G`` gives both (:class:`AutogradProducts`). The graph is built once
and serves every product of the solve. Where an operation has no second derivative, as in a cuDNN LSTM, that graph does
not exist; then central differences of the gradient give both products (:class:`DifferenceProducts`)::

    D2 G v  =  ( grad G(x, y + d u) - grad G(x, y - d u) ) / 2d * ||v||  +  O(d^2),      u = v / ||v||

with ``d = eps^(1/3) (1 + ||y||)``, where truncation and rounding balance: about 10 digits in float64 and 4
in float32. Two first-order passes cost about as much as building the graph and passing through it once, and no graph
is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import SingularCurvatureError
from newton_plugin.bilevel._errors import DoubleBackwardError
from newton_plugin.bilevel._hypergradient.oracle import Oracle, dense, filled
from newton_plugin.bilevel._tensors import Vector, axpy, norm, scale, subtract

__all__ = ["AutogradProducts", "DifferenceProducts", "Products", "lower_products"]


class AutogradProducts:
    """Products by a second backward pass, exact.

    Attributes:
        gradient: ``grad_y G``.
        depends_on_x: whether ``grad_y G`` was seen to depend on x; known after a product in the shape of x.
    """

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self.depends_on_x = False
        graph = torch.autograd.grad(oracle.lower_loss(), oracle.lower, create_graph=True, allow_unused=True)
        oracle.check_lower(graph)
        self.gradient = filled(graph, oracle.lower)
        # Tensors of grad_y G that are constant have no second derivative.
        self._live = [i for i, g in enumerate(graph) if g is not None and g.requires_grad]
        self._graph = [dense(g) for g in graph if g is not None and g.requires_grad]
        if not self._graph:
            raise SingularCurvatureError(_NO_CURVATURE)
        if oracle.inspects_graphs and _has_dead_end(self._graph):
            raise DoubleBackwardError(_message("it is marked once_differentiable"))

    def lower(self, v: Sequence[Tensor]) -> Vector:
        """``D2_yy G v``, in the shape of y."""
        return self._products(v, [], self._oracle.lower)[1]

    def upper(self, v: Sequence[Tensor]) -> Vector:
        """``D2_xy G v``, in the shape of x."""
        return self._products(v, self._oracle.upper, [])[0]

    def both(self, v: Sequence[Tensor]) -> tuple[Vector, Vector]:
        """``D2_yy G v`` and ``D2_xy G v``, in one pass."""
        x, y = self._products(v, self._oracle.upper, self._oracle.lower)
        return y, x

    def _products(self, v: Sequence[Tensor], x: Sequence[Tensor], y: Sequence[Tensor]) -> tuple[Vector, Vector]:
        self._oracle.calls.products += bool(x) + bool(y)
        vectors = [v[i] for i in self._live]
        try:
            found = torch.autograd.grad(self._graph, [*x, *y], vectors, retain_graph=True, allow_unused=True)
        except (RuntimeError, NotImplementedError) as error:
            if not _no_second_derivative(error):
                raise
            raise DoubleBackwardError(_message(_first_line(error))) from error
        if y and all(g is None for g in found[len(x) :]):
            raise SingularCurvatureError(_NO_CURVATURE)
        self.depends_on_x |= any(g is not None for g in found[: len(x)])
        return filled(found[: len(x)], x), filled(found[len(x) :], y)


_NO_CURVATURE = (
    "the loss that lower_closure returned is linear in lower_params as far as autograd can see: its second derivative "
    "is zero. (a) Was it built from detached gradients? (b) Is a term such as weight decay missing? (c) Does its "
    'last operation have a backward that cannot be differentiated? Then use hvp="finite_difference".'
)


def _has_dead_end(gradients: Sequence[Tensor]) -> bool:
    """Whether a gradient went through a backward that is marked once_differentiable.

    ``autograd.grad`` does not raise there. It follows paths to its inputs, and that mark ends a path, so the terms
    behind the mark would silently be missing from the product.
    """
    stack: list[Any] = [g.grad_fn for g in gradients]
    visited = set(stack)
    while stack:
        node = stack.pop()
        if node.name() == "torch::autograd::Error":
            return True
        children = {child for child, _ in node.next_functions if child is not None} - visited
        visited |= children
        stack.extend(children)
    return False


def _message(why: str) -> str:
    return (
        f"the lower loss contains an operation without a second derivative ({why}). Use "
        'hvp="finite_difference", which needs first derivatives only; recurrent layers on cuDNN, fused '
        "attention and torch.compile need it."
    )


def _no_second_derivative(error: BaseException) -> bool:
    text = str(error).lower()
    signs = ("once_differentiable", "double backward", "derivative for", "is not implemented")
    return any(sign in text for sign in signs)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class DifferenceProducts:
    """Products by central differences of first derivatives, on the same sample; the attributes are the same."""

    def __init__(self, oracle: Oracle) -> None:
        self._oracle = oracle
        self.depends_on_x = False
        self._y = [p.detach().clone() for p in oracle.lower]
        eps = max(torch.finfo(p.dtype).eps for p in oracle.lower)
        self._distance = eps ** (1 / 3) * (1 + norm(self._y))
        self._gradient: Vector | None = None

    @property
    def gradient(self) -> Vector:
        """``grad_y G``, evaluated when first asked for."""
        if self._gradient is None:
            self._gradient = self._oracle.lower_gradient(same=True)
        return self._gradient

    def lower(self, v: Sequence[Tensor]) -> Vector:
        """``D2_yy G v``, in the shape of y."""
        return self._difference(v, [], self._oracle.lower)[1]

    def upper(self, v: Sequence[Tensor]) -> Vector:
        """``D2_xy G v``, in the shape of x."""
        return self._difference(v, self._oracle.upper, [])[0]

    def both(self, v: Sequence[Tensor]) -> tuple[Vector, Vector]:
        """``D2_yy G v`` and ``D2_xy G v``, in one pass."""
        x, y = self._difference(v, self._oracle.upper, self._oracle.lower)
        return y, x

    def _difference(self, v: Sequence[Tensor], x: Sequence[Tensor], y: Sequence[Tensor]) -> tuple[Vector, Vector]:
        length = norm(v)
        unit = scale(v, 1 / length.clamp_min(torch.finfo(length.dtype).tiny))  # v = 0 gives 0
        inputs = [*x, *y]
        try:
            ahead = self._gradients(axpy(self._distance, unit, self._y), inputs, len(x))
            behind = self._gradients(axpy(-self._distance, unit, self._y), inputs, len(x))
        finally:
            self._oracle.place(y=self._y)
        found = scale(subtract(ahead, behind), length / (2 * self._distance))
        return found[: len(x)], found[len(x) :]

    def _gradients(self, at: Vector, inputs: list[Tensor], split: int) -> Vector:
        self._oracle.place(y=at)
        found = torch.autograd.grad(self._oracle.lower_loss(), inputs, allow_unused=True)
        if split < len(inputs):
            self._oracle.check_lower(found[split:])
        self.depends_on_x |= any(g is not None for g in found[:split])
        return filled(found, inputs)


Products = AutogradProducts | DifferenceProducts


def lower_products(oracle: Oracle, hvp: str) -> Products:
    """The products of this oracle's lower loss, where the parameters are now."""
    return AutogradProducts(oracle) if hvp == "autograd" else DifferenceProducts(oracle)
