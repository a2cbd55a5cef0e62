"""A Jacobian times a vector without forward mode: for the forward-mode rules of our own autograd functions."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["pushed"]


def pushed(f: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    """``J v``, J the Jacobian of f at x: ``J' u`` is linear in u, and its own transposed derivative is J.

    Inside a rule of forward mode, forward mode itself cannot be used again (torch 2.13: "Nested forward mode AD").

    >>> pushed(lambda x: x**2, torch.tensor([1.0, 3.0]), torch.tensor([1.0, 10.0])).tolist()
    [2.0, 60.0]
    """
    y, pull = torch.func.vjp(f, x)[:2]
    return torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(y))[1](tangent)[0]
