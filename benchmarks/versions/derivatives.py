"""First and second derivatives of any function of tensors, for the record."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from benchmarks.versions.case import Record
from torch import Tensor

__all__ = ["put_derivatives", "weighed"]


def weighed(values: Iterable[Tensor]) -> Tensor:
    """The sum over all entries of the tensors that have a graph, each entry with a weight of its own."""
    parts = [(torch.linspace(1, 2, v.numel()).to(v) * v.flatten()).sum() for v in values if v.requires_grad]
    return torch.stack(parts).sum()


def put_derivatives(record: Record, name: str, function: Callable[[Tensor], Any], at: Tensor) -> None:
    """Values, the gradient of their weighed sum and a product with its Hessian."""
    leaf = at.clone().requires_grad_()
    with record.attempt(name):
        values = function(leaf)
        record.put(name, values)
        total = weighed(values if isinstance(values, tuple) else (values,))
        (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
        record.put(f"{name}, gradient", gradient)
        if gradient.requires_grad:
            product = (torch.linspace(-1, 1, leaf.numel()).to(leaf) * gradient.flatten()).sum()
            record.put(f"{name}, second", torch.autograd.grad(product, leaf, allow_unused=True)[0])
