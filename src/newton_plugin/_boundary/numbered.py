"""A number for each parameter, by which its layer is known. An id is soon that of another tensor."""

from __future__ import annotations

import itertools

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["number_of"]

_NUMBERS = WeakTensorKeyDictionary()
_next_number = itertools.count()


def number_of(parameter: Tensor) -> int:
    """Always the same of one tensor, and never that of another one of this process."""
    number = _NUMBERS.get(parameter)
    if number is None:
        number = _NUMBERS[parameter] = next(_next_number)
    return number
