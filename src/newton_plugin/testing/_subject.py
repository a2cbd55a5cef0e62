"""The loss that is checked: evaluated at any outputs, in any dtype, from the same random state, leaving no trace."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from newton_plugin._boundary.rows import RowLayout
from newton_plugin._errors import ShapeError
from newton_plugin._step.settings import Reduction

__all__ = ["Subject", "own_copy"]


class Subject:
    """One loss at one batch of outputs.

    Gradients are those of the samples' own losses, ``g_i``: N times the gradient of a mean. A loss that is a module
    (or a method of one) is copied, so that its buffers stay as they are. Tensors are copied before each call, so that a
    loss may work in place. The seed is set before each call, and torch's random state is restored after it.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        outputs: Tensor,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        layout: RowLayout,
        reduction: Reduction,
    ) -> None:
        self.loss_fn = own_copy(loss_fn)
        self.outputs = outputs.detach().clone()
        self.args, self.kwargs = _fresh(tuple(args), None), _fresh(dict(kwargs), None)
        self.layout = layout
        self.reduction: Reduction = reduction

    def to(self, dtype: torch.dtype) -> Subject:
        """The same with floating tensors, buffers and parameters in ``dtype``."""
        loss_fn = own_copy(self.loss_fn)
        owner = loss_fn if isinstance(loss_fn, nn.Module) else getattr(loss_fn, "__self__", None)
        if isinstance(owner, nn.Module) and loss_fn is not self.loss_fn:
            owner.to(dtype)
        args, kwargs = _fresh(self.args, dtype), _fresh(self.kwargs, dtype)
        return Subject(loss_fn, self.outputs.to(dtype), args, kwargs, self.layout, self.reduction)

    def call(self, outputs: Tensor, seed: int = 0) -> Any:
        """What the loss returns, of any type."""
        with self.seeded(seed):
            return self.loss_fn(outputs, *_fresh(self.args, None), **_fresh(self.kwargs, None))

    @contextmanager
    def seeded(self, seed: int = 0) -> Iterator[None]:
        """Inside, torch's random state is that of ``seed``; afterwards it is as before."""
        cuda = self.outputs.is_cuda
        with torch.random.fork_rng(devices=[self.outputs.device] if cuda else []):
            torch.default_generator.manual_seed(seed)
            if cuda:
                torch.cuda.manual_seed(seed)
            yield

    def total(self, outputs: Tensor, seed: int = 0) -> Tensor:
        """The sum of the samples' losses, one number."""
        loss = self.call(outputs, seed)
        if not isinstance(loss, Tensor):
            raise TypeError(f"the loss must return a torch.Tensor; it returned a {type(loss).__name__}")
        if loss.numel() == 1:
            return loss.reshape(()) * (self.layout.rows if self.reduction == "mean" else 1)
        if loss.numel() != self.layout.rows:
            raise ShapeError(
                f"the loss must be one number or one for each of the {self.layout.rows} samples; its shape is "
                f"{tuple(loss.shape)}"
            )
        return loss.sum()

    def differentiated(self, outputs: Tensor, seed: int = 0, twice: bool = False) -> tuple[Tensor, Tensor]:
        """``(gradient, leaf)`` by autograd. The loss gets a copy of the leaf: in training, too, outputs are no leaf."""
        leaf = outputs.detach().clone().requires_grad_()
        with torch.enable_grad():
            total = self.total(leaf.clone(), seed)
            (gradient,) = torch.autograd.grad(total, leaf, create_graph=twice, materialize_grads=True)
        return gradient, leaf

    def gradient(self, outputs: Tensor | None = None, seed: int = 0) -> Tensor:
        """``g_i`` in the shape of the outputs."""
        return self.differentiated(self.outputs if outputs is None else outputs, seed)[0].detach()

    def hessian_products(self, probes: Tensor) -> Tensor:
        """(K, *shape) -> (K, *shape), the batch's Hessian times each probe; zeros where the gradient has no graph."""
        gradient, leaf = self.differentiated(self.outputs, twice=True)
        if not gradient.requires_grad:
            return torch.zeros_like(probes)

        def run(vectors: Tensor, batched: bool) -> Tensor:
            (product,) = torch.autograd.grad(
                gradient, leaf, vectors, retain_graph=True, is_grads_batched=batched, materialize_grads=True
            )
            return product.detach()

        try:
            return run(probes, True)
        except RuntimeError:  # an operation cannot be batched: one probe at a time works, or raises the real error
            return torch.stack([run(probe, False) for probe in probes])

    def blocks(self) -> Tensor:
        """(N, m, m), the samples' own Hessians: probe k is the k-th unit vector in every sample."""
        basis = torch.eye(self.layout.features).to(self.outputs)
        probes = basis.unsqueeze(1).expand(-1, self.layout.rows, -1)
        products = self.layout.to_rows(self.hessian_products(self.layout.from_rows(probes)))
        return products.movedim(0, -2)


def own_copy(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A module, or a method of one, as a copy; anything else as it is."""
    owner = getattr(loss_fn, "__self__", None)
    try:
        if isinstance(loss_fn, nn.Module):
            return copy.deepcopy(loss_fn)
        if isinstance(owner, nn.Module):
            return loss_fn.__func__.__get__(copy.deepcopy(owner))  # type: ignore[attr-defined]
    except Exception:  # it cannot be copied, as it holds a part of a graph, say: it is used as it is
        return loss_fn
    return loss_fn


def _fresh(value: Any, dtype: torch.dtype | None) -> Any:
    """Copies of the tensors in ``value``, floating ones in ``dtype``."""
    if isinstance(value, Tensor):
        copied = value.detach().clone()
        return copied if dtype is None or not value.is_floating_point() else copied.to(dtype)
    if isinstance(value, dict):
        return {key: _fresh(item, dtype) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_fresh(item, dtype) for item in value)
    return value
