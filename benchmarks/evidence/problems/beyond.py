"""Losses that are widely used and that the paper does not have: NDCG, CTC, a quadratic program."""

from __future__ import annotations

from functools import cache

import torch
from benchmarks.evidence.problems.allocation import Allocation
from benchmarks.evidence.problems.relevance import Relevance
from benchmarks.evidence.problems.sequences import CLASSES, Sequences

__all__ = ["beyond_problems", "ignorant_scores"]


def beyond_problems(folder: str | None) -> list[Relevance | Sequences | Allocation]:
    """Table 7 of the plan, but for the bilevel one, which is no stack of replicas (``bilevel_lists``)."""
    return [
        Relevance("ndcg_10", "NDCG@5 by NeuralSort, lists of 10", folder=folder),
        Sequences("ctc_4", "CTC, lines of 4 digits", folder=folder),
        Allocation("allocation_8", "QP, portfolios of 8 assets", folder=folder),
    ]


@cache
def ignorant_scores() -> dict[str, float]:
    """Per cent on test data of who has learned nothing: any order, no label, the same forecast for every asset."""
    generator, scores = torch.Generator().manual_seed(0), {}
    for problem in beyond_problems(None):
        _, targets = problem.held_out("test")
        outputs = torch.zeros(targets.shape)
        if isinstance(problem, Relevance):
            outputs = torch.rand(targets.shape, generator=generator)
        elif isinstance(problem, Sequences):
            outputs = torch.zeros(*targets.shape, CLASSES)
        scores[problem.name] = 100 * float(problem.score(outputs, targets).mean())
    return scores
