"""Collects what a look reports: the steps, the checks, and from both the advice."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from newton_plugin._boundary.rows import RowLayout, check_feature_dims
from newton_plugin._doors.found import FoundBoundary
from newton_plugin._doors.last_step import LastStep
from newton_plugin._doors.optimizers import is_memoryless
from newton_plugin._errors import ArgumentError
from newton_plugin.testing._advice import Evidence, advise
from newton_plugin.testing._check import check_loss
from newton_plugin.testing._look_report import Checked, Cost, LookReport
from newton_plugin.testing._report import LossReport
from newton_plugin.testing._subject import Subject
from newton_plugin.testing._watching import Watched

__all__ = ["Watch"]


class Watch:
    """For a training loop of your own, or a framework's: :func:`look` and Lightning's ``look`` are made of it.

    Train with ``curvature=Watching()``; after each backward pass call ``watch.add(hook.boundaries, hook.last_steps)``,
    at the end ``watch.report()``.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._boundaries: dict[str, FoundBoundary] = {}
        self._watched: dict[str, Watched] = {}
        self._checks: dict[str, Checked] = {}

    def __len__(self) -> int:
        return self._steps

    @property
    def boundaries(self) -> Sequence[FoundBoundary]:
        """Those seen so far."""
        return tuple(self._boundaries.values())

    def add(self, boundaries: Sequence[FoundBoundary], last_steps: Sequence[LastStep]) -> None:
        """Look at a step that a backward pass has taken. Waits for the device."""
        self._steps += 1
        found = {boundary.name: boundary for boundary in boundaries}
        for last in last_steps:
            if last.name in found:
                self._boundaries[last.name] = found[last.name]
                self._watched.setdefault(last.name, Watched()).add(last)

    def check(
        self, name: str, loss_fn: Callable[..., Any], outputs: Tensor, *args: Any, reduction: Any, feature_dims: Any
    ) -> None:
        """:func:`check_loss` at one boundary."""
        report = check_loss(loss_fn, outputs, *args, reduction=reduction, feature_dims=feature_dims)
        layout = RowLayout(tuple(outputs.shape), check_feature_dims(feature_dims))
        with torch.enable_grad():
            sizes, errors = _by_sample(Subject(loss_fn, outputs, args, {}, layout, reduction), report)
        self._checks[name] = Checked(report, "", sizes, errors)

    def not_checked(self, name: str, why: str) -> None:
        """Why there is no :meth:`check`."""
        self._checks[name] = Checked(None, why)

    def report(self, cost: Cost | None = None, optimizer: Any = None) -> LookReport:
        """What was seen.

        Args:
            cost: of a step.
            optimizer: that takes the steps, or several of them; None: one that remembers gradients, as Adam does.

        Raises:
            ArgumentError: no step has been added.
            ArgumentTypeError: no optimizer.
        """
        memoryless = optimizer is not None and is_memoryless(optimizer)
        if not self._watched:
            raise ArgumentError("watch must have seen at least one step; got none. Add steps by watch.add(...).")
        main = max(self._watched, key=lambda name: self._watched[name].square)
        checked = self._checks.get(main)
        advice = advise(self._evidence(main, None if checked is None else checked.report, memoryless))
        return LookReport(self._steps, self.boundaries, dict(self._watched), dict(self._checks), cost, advice)

    def _evidence(self, main: str, report: LossReport | None, memoryless: bool) -> Evidence:
        watched, seen = self._watched[main], self._watched[main].reading
        return Evidence(
            fault=report.advice.because if report is not None and report.advice.take == "mend" else "",
            random=report is not None and report.determinism.verdict in ("random", "unrepeatable"),
            samples=self._boundaries[main].samples,
            tail=watched.tail(),
            tail_before=watched.tail(late=False),
            spread=watched.spread(),
            gate=seen("gate") if not math.isnan(seen("contradiction")) else math.nan,
            contradiction=seen("contradiction"),
            memoryless=memoryless,
        )


def _by_sample(subject: Subject, report: LossReport) -> tuple[Tensor | None, Tensor | None]:
    """``|g_i|`` in float64 and the error of that in float32, where they were compared."""
    if report.precision.number is None:
        return None, None
    low = subject.to(torch.float32)
    ours, theirs = (subject.layout.to_rows(s.gradient()).double() for s in (low, low.to(torch.float64)))
    return theirs.norm(dim=-1).cpu(), (ours - theirs).norm(dim=-1).cpu()
