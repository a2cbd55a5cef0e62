"""What a method may ask of the two closures: gradients and products with second derivatives, counted.

The closures read the *current* parameters. To evaluate them at another point, its values are written into the
parameters, and afterwards the old values are written back. Writing in place keeps the module itself: views, cuDNN's
flat weights and compiled code stay valid. An :class:`Oracle` lives for one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from newton_plugin._errors import ArgumentTypeError, NoGradientError, ShapeError
from newton_plugin.bilevel._hypergradient.replay import Replay
from newton_plugin.bilevel._tensors import assign, zeros_like

__all__ = ["Closure", "Oracle", "OracleCalls", "UpperGradients", "dense", "filled"]

Closure = Callable[[], Tensor]


@dataclass
class OracleCalls:
    """The number of derivatives taken since the optimizer was made; methods are compared at equal numbers.

    Attributes:
        upper_gradients: gradients of the upper loss F, with respect to both levels at once.
        lower_gradients: gradients of the lower loss G.
        products: ``D2_yy G v`` and ``D2_xy G v``. Each counts, also where one backward pass gives both. A product by
            finite differences is not counted here; its two gradients are, in ``lower_gradients``.
    """

    upper_gradients: int = 0
    lower_gradients: int = 0
    products: int = 0

    @property
    def total(self) -> int:
        return self.upper_gradients + self.lower_gradients + self.products


@dataclass
class UpperGradients:
    """F and its partial gradients at one point; ``depends_on_x`` is False where F reaches y alone."""

    value: Tensor
    x: list[Tensor]
    y: list[Tensor]
    depends_on_x: bool


class Oracle:
    """The upper loss F(x, y) and the lower loss G(x, y) of one step, on one sample each.

    Args:
        upper_closure, lower_closure: return F and G at the current parameters. None for a loss that is not needed.
        upper, lower: x and y, tensors that require grad.
        calls: the counter.
        inspects_graphs: whether the lower loss's graph is searched for operations that cannot be differentiated
            twice; an optimizer does so at its first step only.
    """

    def __init__(
        self,
        upper_closure: Closure | None,
        lower_closure: Closure | None,
        upper: Sequence[Tensor],
        lower: Sequence[Tensor],
        calls: OracleCalls | None = None,
        inspects_graphs: bool = True,
    ) -> None:
        self.inspects_graphs = inspects_graphs
        self._closures = {"upper_closure": upper_closure, "lower_closure": lower_closure}
        for name, closure in self._closures.items():
            if closure is not None and not callable(closure):
                raise ArgumentTypeError(
                    f"{name} must be a function without arguments that returns the loss; got {type(closure).__name__}."
                )
        self.upper, self.lower = list(upper), list(lower)
        self.calls = OracleCalls() if calls is None else calls
        self._replay = Replay([*self.upper, *self.lower])

    @contextmanager
    def undone_on_error(self) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Copies of x and y as they are now; they are written back if the block raises."""
        x, y = [p.detach().clone() for p in self.upper], [p.detach().clone() for p in self.lower]
        try:
            yield x, y
        except BaseException:
            self.place(x, y)
            raise

    def place(self, x: Sequence[Tensor] | None = None, y: Sequence[Tensor] | None = None) -> None:
        """Write values into the parameters."""
        for params, values in ((self.upper, x), (self.lower, y)):
            if values is not None:
                assign(params, values)

    def upper_gradients(self) -> UpperGradients:
        """F, its gradients in x and y, on this step's sample."""
        value = self._evaluate("upper_closure", same=True)
        self.calls.upper_gradients += 1
        both = torch.autograd.grad(value, [*self.upper, *self.lower], allow_unused=True)
        x, y = both[: len(self.upper)], both[len(self.upper) :]
        if all(g is None for g in y):
            raise NoGradientError(
                "the loss that upper_closure returned does not depend on lower_params, so the lower level has no "
                "say in it. Does the closure evaluate the model whose parameters are lower_params, without detach()?"
            )
        depends = any(g is not None for g in x)
        return UpperGradients(value.detach(), filled(x, self.upper), filled(y, self.lower), depends)

    def lower_loss(self, same: bool = True) -> Tensor:
        """G with its graph: on this step's ``same`` sample, or on a new one."""
        value = self._evaluate("lower_closure", same)
        self.calls.lower_gradients += 1
        return value

    def lower_gradient(self, same: bool = False) -> list[Tensor]:
        """The gradient of G in y."""
        return self._lower_gradient(self.lower_loss(same))

    def lower_value_and_gradient(self, repeats: bool = True) -> tuple[Tensor, list[Tensor]]:
        """G and its gradient in y on a new sample. Unless it ``repeats`` a batch, the evaluation updates buffers."""
        if not repeats:
            self._replay.forget()
        value = self.lower_loss(same=False)
        return value.detach(), self._lower_gradient(value)

    def _lower_gradient(self, value: Tensor) -> list[Tensor]:
        gradients = torch.autograd.grad(value, self.lower, allow_unused=True)
        self.check_lower(gradients)
        return filled(gradients, self.lower)

    @staticmethod
    def check_lower(gradients: Sequence[Tensor | None]) -> None:
        """Raise unless G depends on y."""
        if all(g is None for g in gradients):
            raise NoGradientError(
                "the loss that lower_closure returned does not depend on lower_params. Does the closure evaluate "
                "the model whose parameters are lower_params, without detach()?"
            )

    def _evaluate(self, name: str, same: bool) -> Tensor:
        closure = self._closures[name]
        assert closure is not None
        with torch.enable_grad():
            value: Any = self._replay.same(name, closure) if same else self._replay.fresh(name, closure)
        if not isinstance(value, Tensor):
            raise ArgumentTypeError(f"{name} must return the loss, a torch.Tensor; got {type(value).__name__}.")
        if value.numel() != 1:
            raise ShapeError(f"{name} must return one number; got shape {tuple(value.shape)}. Reduce the loss first.")
        if not value.requires_grad:
            raise NoGradientError(
                f"the loss that {name} returned has no autograd graph: it was detached, computed under "
                "torch.no_grad(), or all it depends on is frozen. Return the loss itself, without backward()."
            )
        return value


def filled(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """The gradients, dense and detached, with zeros in place of None."""
    return [
        zeros_like([p])[0].detach() if g is None else dense(g).detach() for g, p in zip(gradients, like, strict=True)
    ]


def dense(gradient: Tensor) -> Tensor:
    """A gradient as an ordinary tensor, with its graph. That of an ``Embedding(sparse=True)`` is sparse."""
    return gradient if gradient.layout == torch.strided else gradient.to_dense()
