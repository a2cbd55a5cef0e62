"""The groups of cases, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from benchmarks.versions import bilevel, curvatures, paths, qp, reports, sorts, steps
from benchmarks.versions.case import Case

__all__ = ["GROUPS", "all_cases"]

GROUPS: dict[str, Callable[[], list[Case]]] = {
    "steps": steps.cases,
    "curvatures": curvatures.cases,
    "qp": qp.cases,
    "sorts": sorts.cases,
    "paths": paths.cases,
    "bilevel": bilevel.cases,
    "reports": reports.cases,
}


def all_cases(only: Iterable[str] | None = None, every: int = 1) -> list[Case]:
    """Every k-th case of the groups named; of all groups if none is."""
    return [case for name in (GROUPS if only is None else only) for case in GROUPS[name]()[::every]]
