"""All problems by name."""

from __future__ import annotations

from benchmarks.evidence.problems.beyond import beyond_problems
from benchmarks.evidence.problems.classification import classification_problems
from benchmarks.evidence.problems.doses import dose_problems
from benchmarks.evidence.problems.paths import path_problems
from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.problems.ranking import ranking_problems

__all__ = ["problems"]


def problems(scale: str = "cpu", folder: str | None = None, device: str = "cpu") -> dict[str, Problem]:
    """Every problem of a scale.

    Args:
        scale: "cpu" or "paper".
        folder: with MNIST's IDX files; None: scikit-learn's digits.
        device: where training images are drawn, of problems that have many.
    """
    every: list[Problem] = [
        *ranking_problems(scale, folder, device),
        *path_problems(scale),
        *classification_problems(folder),
    ]
    if scale == "cpu":
        every += beyond_problems(folder)
    named = {problem.name: problem for problem in every}
    varied = {problem.name: problem for problem in dose_problems(named)} if scale == "cpu" else {}
    assert not named.keys() & varied.keys(), "a name has one problem"
    return named | varied
