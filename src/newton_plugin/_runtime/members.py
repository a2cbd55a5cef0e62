"""Tensors that live longer than a transform: one for each member of a ``vmap``, kept in memory outside of it.

A function under ``vmap`` sees one member. What it keeps in a Python object would be a tensor of a level that is gone.
:func:`keep` and :func:`kept` are torch's own way out of the levels and back in, an ``autograd.Function`` with a rule
for ``vmap``. Each level adds a dimension in front, so that members of members have two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Shelf", "keep", "kept"]

_MOST_SIZES = 16  # of levels, on one shelf: the sizes of batches may change all the time


class Shelf:
    """Where the tensors are kept: by the sizes of the levels, outermost first, () outside of any ``vmap``."""

    def __init__(self) -> None:
        self.tensors: dict[tuple[int, ...], list[Tensor]] = {}

    @property
    def last(self) -> list[Tensor] | None:
        """What was kept last; None if nothing was."""
        return next(reversed(self.tensors.values()), None)


class _Place(NamedTuple):
    """A shelf as it is seen from inside of some levels.

    Attributes:
        shelf: see :class:`Shelf`.
        sizes: of the levels that have been left behind, outermost first.
    """

    shelf: Shelf
    sizes: tuple[int, ...] = ()

    def within(self, size: int) -> _Place:
        return _Place(self.shelf, (size, *self.sizes))


def kept(shelf: Shelf, anchor: Tensor, fresh: Sequence[Tensor]) -> list[Tensor]:
    """What :func:`keep` has kept for the members that ``anchor`` belongs to, or ``fresh``, the same for all of them.

    Args:
        shelf: of both functions.
        anchor: a tensor that is another one for each member.
        fresh: what there is before anything was kept, in shapes of one member.
    """
    if not fresh:
        return []
    return list(_Kept.apply(_Place(shelf), anchor.detach(), *(tensor.detach() for tensor in fresh)))  # type: ignore[misc]


def keep(shelf: Shelf, anchor: Tensor, tensors: Sequence[Tensor]) -> None:
    """Keep tensors of the members that ``anchor`` belongs to; one that is the same for all of them is kept for each."""
    if tensors:
        _Keep.apply(_Place(shelf), anchor.detach(), *(tensor.detach() for tensor in tensors))


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(place: _Place, anchor: Tensor, *fresh: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        before = place.shelf.tensors.get(place.sizes, ())
        if [tensor.shape for tensor in before] == [tensor.shape for tensor in fresh]:  # else other outputs: begin anew
            return tuple(old.to(new, copy=True) for old, new in zip(before, fresh, strict=True))
        return tuple(tensor.clone() for tensor in fresh)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise AssertionError("nothing that is kept is differentiable")

    @staticmethod
    def vmap(info: Any, in_dims: Any, place: _Place, anchor: Tensor, *fresh: Tensor) -> Any:  # type: ignore[override]
        size = info.batch_size
        each = _of_all(size, in_dims[2:], fresh)
        out = _Kept.apply(place.within(size), _in_front(size, in_dims[1], anchor), *each)
        return out, (0,) * len(fresh)


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(place: _Place, anchor: Tensor, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        shelf = place.shelf.tensors
        shelf.pop(place.sizes, None)  # the last one is the newest
        while len(shelf) >= _MOST_SIZES:
            shelf.pop(next(iter(shelf)))
        shelf[place.sizes] = [tensor.clone() for tensor in tensors]
        return anchor.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise AssertionError("nothing that is kept is differentiable")

    @staticmethod
    def vmap(info: Any, in_dims: Any, place: _Place, anchor: Tensor, *tensors: Tensor) -> Any:  # type: ignore[override]
        size = info.batch_size
        each = _of_all(size, in_dims[2:], tensors)
        return _Keep.apply(place.within(size), _in_front(size, in_dims[1], anchor), *each), None


def _of_all(size: int, in_dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    return [_in_front(size, dim, tensor) for dim, tensor in zip(in_dims, tensors, strict=True)]


def _in_front(size: int, dim: int | None, tensor: Tensor) -> Tensor:
    """The members' dimension first; one for each member where there is none."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
