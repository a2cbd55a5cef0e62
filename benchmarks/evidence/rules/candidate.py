"""A candidate rule as a curvature of the package, for a batch that holds all replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from benchmarks.evidence.problems.problem import RowsLoss
from benchmarks.evidence.rules.grouped import Tally, live_share
from benchmarks.evidence.rules.rule import Batch, Rule
from torch import Tensor

import newton_plugin as npl

__all__ = ["Candidate"]


class Candidate(npl.Curvature):
    """A rule as a curvature for rows (R * N, m). It keeps no state: runs are never continued in the middle.

    Args:
        rule: what to try.
        replicas: R.
        rows: the loss, for rules that evaluate it once more.
        tally: counts the batches of a replica whose step was not finite and that kept their gradient.

    Attributes:
        head_of: from the gradients (R, N, m) at the outputs of this batch to those at the last layer, (R, N, D).
    """

    def __init__(self, rule: Rule, replicas: int, rows: RowsLoss, tally: Tally) -> None:
        self.rule, self.replicas, self.rows, self.tally = rule, replicas, rows, tally
        self.needs_hessian = rule.needs_hessian
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None
        self.head_of: Callable[[Tensor], Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Candidate:
        return self  # the loss tells this very object what it sees

    def watch(self, outputs: Tensor, targets: Tensor, losses: Tensor) -> None:
        """What the loss was just called with, and its value for each row."""
        self._seen = outputs, targets, losses

    def step(self, gradient: Tensor, hvp: Callable[[Tensor], Tensor] | None, damping: npl.Damping) -> npl.CurvatureStep:
        """See :meth:`newton_plugin.Curvature.step`; ``damping`` is not used."""
        assert self._seen is not None
        outputs, targets, losses = self._seen
        n, m = gradient.shape
        shape = (self.replicas, n // self.replicas)
        share = live_share(gradient)  # rules are written for gradients of a mean over all rows

        def evaluate(at: Tensor) -> Tensor:
            return self.rows(at.reshape(outputs.shape).to(outputs.dtype), targets).reshape(shape).to(at.dtype)

        def hessian() -> Tensor:
            assert hvp is not None
            eye = torch.eye(m, dtype=gradient.dtype, device=gradient.device)
            columns = hvp(eye.unsqueeze(1).expand(-1, n, -1)).movedim(0, -1)
            return ((columns + columns.mT) / 2).reshape(*shape, m, m) / share

        g = gradient.reshape(*shape, m) / share

        def head() -> Tensor:
            assert self.head_of is not None
            return self.head_of(g)

        values = losses.reshape(shape).to(g.dtype)
        with torch.no_grad():
            step = self.rule.step(Batch(g, values, outputs.reshape(*shape, m).to(g.dtype), evaluate, hessian, head))
        fine = torch.isfinite(step).flatten(1).all(1)
        self.tally.kept += ~fine
        step = torch.where(fine[:, None, None], step, g).reshape(n, m) * share
        zero = step.new_zeros(())
        return npl.CurvatureStep(step, zero, extremes=lambda: (zero, zero))
