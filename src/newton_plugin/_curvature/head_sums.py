r"""Gradients at the weights of the last layer, summed over groups of samples.

A layer that maps inputs b (d numbers) to outputs (k numbers) at P positions of a sample has, for sample i, the gradient
``v_i = sum_p a_ip b_ip'``, a matrix of k times d numbers; a is the gradient at the layer's outputs. Only sums of the
``v_i`` over groups, and of their squares, are wanted. With one position no ``v_i`` is formed: the squares of
``a_i b_i'`` are the products of squares, and both sums are products of matrices. Where k d is large, a and b are first
added up, with random signs, in fewer numbers: inner products of sums stay what they are on average (a count sketch).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from newton_plugin._linalg.damped_inverse import HALF
from newton_plugin._runtime.cuda_graphs import capturing

__all__ = ["HeadRows", "HeadSums", "head_size", "head_sums"]

_MOST = 2**14  # numbers of one v_i; more would be as much to send between processes as a small layer's gradient
_MOST_INPUTS = 2**12


@dataclass(frozen=True)
class HeadRows:
    """The last layer of one batch.

    Attributes:
        gradients: (N, P, k), of the samples' losses at the layer's outputs, in the unit of the rows that a step gets.
        inputs: (N, P, d), of the layer.
    """

    gradients: Tensor
    inputs: Tensor

    @staticmethod
    def joined(parts: list[HeadRows]) -> HeadRows | None:
        """Of all calls of one layer; None where their positions differ in number."""
        if len(parts) > 1:
            parts = [part for part in parts if len(part)] or parts[:1]
        first = parts[0]
        if len(parts) == 1:
            return first
        if any(part.inputs.shape[1:] != first.inputs.shape[1:] for part in parts):
            return None
        return HeadRows(torch.cat([p.gradients for p in parts]), torch.cat([p.inputs for p in parts]))

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True)
class HeadSums:
    """Sums over K groups of samples.

    Attributes:
        sums: (K, D), of the ``v_i``.
        squares: (K, D), of the squares of their numbers.
    """

    sums: Tensor
    squares: Tensor


def head_size(head: HeadRows) -> int:
    """D, the numbers of a ``v_i`` as :func:`head_sums` has them."""
    d = _width(head.inputs.shape[-1], _MOST_INPUTS)
    return d * _width(head.gradients.shape[-1], max(1, _MOST // d))


def head_sums(head: HeadRows, groups: Tensor, scale: Tensor) -> HeadSums:
    """The sums of ``scale v_i`` over groups, and of their squares.

    Args:
        head: the layer.
        groups: (K, N): how much of a sample is in each group.
        scale: no dimensions.
    """
    b = head.inputs
    dtype = torch.float32 if b.dtype in HALF else b.dtype
    a = head.gradients.to(dtype) if head.gradients.dtype in HALF else head.gradients
    b = _sketched(b.to(dtype), _MOST_INPUTS)
    a = _sketched(a, max(1, _MOST // b.shape[-1]))
    a = (a * scale.to(a.dtype)).to(dtype)
    groups = groups.to(dtype)
    n, positions, k = a.shape
    if positions == 1:
        a, b, count = a[:, 0], b[:, 0], len(groups)
        sums = (groups.unsqueeze(-1) * a).mT @ b  # (K, k, d)
        squares = (groups.unsqueeze(-1) * a.square()).mT @ b.square()
        return HeadSums(sums.reshape(count, -1), squares.reshape(count, -1))
    v = (a.mT @ b).reshape(n, k * b.shape[-1])
    return HeadSums(groups @ v, groups @ v.square())


def _width(size: int, most: int) -> int:
    """The numbers to which ``size`` are added up."""
    return size if size <= most else -(-size // -(-size // most))


def _sketched(x: Tensor, most: int) -> Tensor:
    """The last dimension added up, with random signs, to ``most`` numbers at the most."""
    size = x.shape[-1]
    if size <= most:
        return x
    width = _width(size, most)
    rounds = -(-size // width)
    anew = torch.compiler.is_compiling() or capturing(x)  # what a CUDA graph makes is the graph's own
    signs = (_drawn if anew else _signs)(size, x.dtype, x.device)
    signed = torch.nn.functional.pad(x * signs, (0, rounds * width - size))
    return signed.unflatten(-1, (rounds, width)).sum(-2)


def _drawn(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same signs at every step and on every rank: bits of the products of their numbers with an odd one."""
    mixed = torch.arange(1, size + 1, dtype=torch.int64, device=device) * 2654435761
    mixed = (mixed ^ (mixed >> 15)) * 2246822519
    return (1 - 2 * ((mixed >> 17) & 1)).to(dtype)


_signs = functools.lru_cache(maxsize=16)(_drawn)
