"""Two files of results, case by case."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from benchmarks.versions.plain import DIGEST
from torch import Tensor

__all__ = ["NARROW_EPS", "TOLERANCE", "Difference", "compare", "differences", "table"]

TOLERANCE = 2e-14
# A difference of 1e-16 inside can turn the rounding of a float32, bfloat16 or float16 result. Results narrower than
# float64 may differ by so many units of their own precision.
NARROW_EPS = 4
_LONGEST = 300  # characters of a value that is shown


@dataclass(frozen=True)
class Difference:
    """Between two results.

    Attributes:
        at: which entry of the record.
        size: relative; infinite where the two cannot be compared.
        eps: precision of the dtype.
        words: what is different, where ``size`` does not say it.
    """

    at: str
    size: float
    eps: float = 2.0**-52
    words: str = ""

    @property
    def narrow(self) -> bool:
        """Whether the results are of less than float64."""
        return self.eps > 2.0**-52

    def exceeds(self, tolerance: float) -> bool:
        """Whether it is a failure."""
        return self.size > max(tolerance, NARROW_EPS * self.eps if self.narrow else 0.0)

    def __str__(self) -> str:
        return f"{self.at}: {self.words or f'{self.size:.2g}'}"


def differences(old: Any, new: Any, at: str = "") -> Iterator[Difference]:
    """Everything in which two plain results are not equal to the bit."""
    if type(old) is not type(new):
        yield Difference(at, math.inf, words=f"{_short(old)} became {_short(new)}")
    elif isinstance(old, dict):
        if DIGEST in old and DIGEST in new and old[DIGEST] == new[DIGEST]:
            return
        for key in [*old, *(k for k in new if k not in old)]:
            below = f"{at} / {key}" if at else key
            if key not in old or key not in new:
                change = f"only in the {'old' if key in old else 'new'}: {_short((old if key in old else new)[key])}"
                yield Difference(below, math.inf, words=change)
            elif key != DIGEST:
                yield from differences(old[key], new[key], below)
        if DIGEST in old:  # the bytes differ, though perhaps none of those that were kept
            yield Difference(at, 0.0)
    elif isinstance(old, list):
        if len(old) != len(new):
            yield Difference(at, math.inf, words=f"length {len(old)} became {len(new)}")
            return
        for k, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{at}[{k}]")
    elif isinstance(old, Tensor):
        yield from _of_tensors(old, new, at)
    elif isinstance(old, float):
        yield from _of_tensors(torch.tensor(old, dtype=torch.float64), torch.tensor(new, dtype=torch.float64), at)
    elif old != new:
        yield Difference(at, math.inf, words=f"{_short(old)} became {_short(new)}")


def _of_tensors(old: Tensor, new: Tensor, at: str) -> Iterator[Difference]:
    """The largest difference of two elements against the largest element that is finite."""
    if old.shape != new.shape or old.dtype != new.dtype or old.layout != new.layout:
        change = f"{old.dtype} {tuple(old.shape)} became {new.dtype} {tuple(new.shape)}"
        yield Difference(at, math.inf, words=change)
        return
    if not old.is_floating_point():
        if not torch.equal(old, new):
            yield Difference(at, math.inf, words=f"{_short(old)} became {_short(new)}")
        return
    eps = torch.finfo(old.dtype).eps
    a, b = old.to(torch.float64), new.to(torch.float64)
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return
    finite = a.isfinite() & b.isfinite()
    if not bool((same | finite).all()):
        yield Difference(at, math.inf, eps, "not finite in other places")
        return
    a, b = a[finite], b[finite]
    yield Difference(at, float((a - b).abs().max() / torch.maximum(a.abs(), b.abs()).max()), eps)


def _short(value: Any) -> str:
    text = f"{value.flatten()[:8].tolist()}" if isinstance(value, Tensor) else " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


@dataclass
class Group:
    """What came of one group of cases."""

    cases: int = 0
    equal: int = 0
    largest: float = 0.0
    largest_narrow: float = 0.0
    failures: list[str] = field(default_factory=list)

    def add(self, name: str, found: list[Difference], tolerance: float) -> None:
        """Count one case."""
        self.cases += 1
        self.equal += not found
        for difference in found:
            if difference.narrow:
                self.largest_narrow = max(self.largest_narrow, difference.size / difference.eps)
            else:
                self.largest = max(self.largest, difference.size)
        failed = [d for d in found if d.exceeds(tolerance)]
        if failed:
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            # An error says more than the values that are missing because of it.
            worst = max(failed, key=lambda d: (d.at.endswith(", error"), d.size))
            self.failures.append(f"{name}\n    {worst}{more}")


def compare(old: dict[str, Any], new: dict[str, Any], tolerance: float = TOLERANCE) -> dict[str, Group]:
    """The groups of two files' results, ``{case: entries}``. A case that one of them lacks is a failure."""
    groups: dict[str, Group] = {}
    for name in [*old, *(k for k in new if k not in old)]:
        found = list(differences(old.get(name), new.get(name)))
        groups.setdefault(name.partition(":")[0], Group()).add(name, found, tolerance)
    return groups


def table(groups: dict[str, Group]) -> str:
    """Markdown: one row for each group, and their sum."""
    total = Group(
        sum(g.cases for g in groups.values()),
        sum(g.equal for g in groups.values()),
        max((g.largest for g in groups.values()), default=0.0),
        max((g.largest_narrow for g in groups.values()), default=0.0),
        [f for g in groups.values() for f in g.failures],
    )
    lines = [
        "| group | cases | equal to the bit | largest difference, float64 | narrower dtypes, units of eps | failures |",
        "|---|---|---|---|---|---|",
    ]
    for name, group in [*groups.items(), ("all", total)]:
        numbers = f"{group.cases} | {group.equal} | {group.largest:.1e} | {group.largest_narrow:.1f}"
        lines.append(f"| {name} | {numbers} | {len(group.failures)} |")
    return "\n".join(lines)
