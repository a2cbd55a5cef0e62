"""Whether all ranks have passed the same text, from sums over the ranks: no collective of its own.

A text becomes a few whole numbers h, pieces of its hash, and their squares. By Cauchy and Schwarz all R ranks have the
same h if and only if ``R sum h^2 = (sum h)^2``. The pieces are small, so all sums are exact, in float64 for any number
of ranks that exists, and in float32 up to 4,000.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["CODES", "Verdict", "all_equal", "code_of", "codes_of", "were_equal"]

_PIECES, _BITS = 9, 6  # 54 bits of the hash
CODES = 2 * _PIECES  # how many numbers a text becomes


def code_of(what: str) -> int:
    """The hash of a text, positive and below 2^54."""
    digest = hashlib.blake2b(what.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2 ** (_PIECES * _BITS)


@functools.lru_cache(maxsize=64)
def codes_of(what: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The numbers of a text, (CODES,). Kept: on an accelerator new ones are a copy from the host."""
    code = code_of(what)
    pieces = [code >> (_BITS * k) & (2**_BITS - 1) for k in range(_PIECES)]
    return torch.tensor([*pieces, *(piece**2 for piece in pieces)], dtype=dtype, device=device)


def were_equal(sums: Sequence[float], ranks: int) -> bool:
    """Whether so many ranks had the same numbers, from their sums."""
    return all(ranks * int(sums[_PIECES + k]) == int(sums[k]) ** 2 for k in range(_PIECES))


def all_equal(sums: Tensor, ranks: int) -> Tensor:
    """The same as a tensor without dimensions, without waiting for the device."""
    total, squares = sums.to(torch.int64).split(_PIECES)
    return (squares * ranks == total.square()).all()


@dataclass(frozen=True)
class Verdict:
    """Whether the ranks agreed, on its way to the host.

    Attributes:
        agreed: of the host, without dimensions.
        what: what this rank passed.
        copied: when it is there; None: it is.
    """

    agreed: Tensor
    what: str
    copied: torch.Event | None

    @staticmethod
    def of(agreed: Tensor, what: str) -> Verdict:
        """From a tensor of any device; nobody waits."""
        if agreed.device.type == "cpu":
            return Verdict(agreed, what, None)
        copied = torch.Event(agreed.device)
        verdict = Verdict(agreed.to("cpu", non_blocking=True), what, copied)
        copied.record()
        return verdict

    def read(self) -> bool:
        """Waits for no more than the copy."""
        if self.copied is not None:
            self.copied.synchronize()
        return bool(self.agreed)
