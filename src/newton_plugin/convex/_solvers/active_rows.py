"""Which rows are active, read from a solver's approximate solution and multipliers."""

from __future__ import annotations

import torch
from torch import Tensor

from newton_plugin.convex._system.problem import Problem
from newton_plugin.convex._system.products import times, times_transposed

__all__ = ["rows_from_duals"]


def rows_from_duals(problem: Problem, x: Tensor, y: Tensor) -> Tensor:
    """Active rows from an approximate x (B, n) and y (B, K): the scaled multiplier exceeds the scaled slack."""
    length = torch.linalg.vector_norm(problem.C, dim=-1).clamp(min=1e-300)
    slack = (problem.c - times(problem.C, x)).clamp(min=0) / length
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    terms = (times(problem.Q, x), problem.p, times_transposed(problem.C, y))
    gradient = torch.stack([torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in terms]).amax(0)
    return y * length * size.clamp(min=1e-12) > slack * gradient
