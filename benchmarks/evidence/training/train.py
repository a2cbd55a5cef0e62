"""Train the replicas of one problem and arm; return the scores of each."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from benchmarks.evidence.problems.problem import Problem, RowsLoss
from benchmarks.evidence.rules.candidate import Candidate
from benchmarks.evidence.rules.gated import Gated
from benchmarks.evidence.rules.grouped import Grouped, Tally
from benchmarks.evidence.training.arms import Arm
from benchmarks.evidence.training.replicas import Adam, Networks, NormaliseByNorm, Sgd, clip_by_norm
from benchmarks.evidence.training.runs import Run
from torch import Tensor

import newton_plugin as npl

__all__ = ["CHECKPOINTS", "Trainer", "train"]

CHECKPOINTS = 10
"""Evaluations of a run, at equal distances; the second is at one fifth of the steps."""


def train(problem: Problem, arm: Arm, runs: Sequence[Run], device: str = "cpu") -> list[dict[str, Any]]:
    """Results of runs that differ in seed, learning rate and second number only, in their order.

    A batch with a gradient that is not finite is kept as it is for all replicas together; where that happened, all
    are trained again, one by one.
    """
    trainer = Trainer(problem, arm, runs, device)
    results = trainer.run()
    if trainer.mixed and len(runs) > 1:
        return [train(problem, arm, [run], device)[0] for run in runs]
    return results


class Trainer:
    """One process's replicas.

    Args:
        problem, arm: what to train and how.
        runs: alike but for seed, learning rate and second number.
        device: where to train; data are drawn on the CPU, the same for every device.
    """

    def __init__(self, problem: Problem, arm: Arm, runs: Sequence[Run], device: str = "cpu") -> None:
        first = runs[0]
        if {replace(run, seed=0, learning_rate=0.0, second=None) for run in runs} != {
            replace(first, seed=0, learning_rate=0.0, second=None)
        }:
            raise ValueError("replicas may differ in seed, learning rate and second number only.")
        self.problem, self.arm, self.runs, self.device = problem, arm, list(runs), device
        seeds = [run.seed for run in runs]
        self.distinct = sorted(set(seeds))
        self.which = torch.tensor([self.distinct.index(seed) for seed in seeds])
        self.networks = Networks(problem.network, seeds, device)
        rates = [run.learning_rate for run in runs]
        parameters, steps = self.networks.parameters, first.steps
        adam = problem.optimizer == "adam"
        self.optimizer = Adam(parameters, rates, steps, arm.beta2) if adam else Sgd(parameters, rates, steps)
        self.rows = problem.loss(first.sharpness, seeds, arm.textbook)
        self.tally = Tally(len(runs), device)
        self.criterion = self._criterion()
        self.normalise = NormaliseByNorm()
        self.alive = torch.ones(len(runs), dtype=torch.bool, device=device)
        self.curves: list[list[list[float]]] = [[] for _ in runs]

    @property
    def mixed(self) -> bool:
        """Whether the whole batch once kept its gradient because of one replica's."""
        if not isinstance(self.criterion, npl.NewtonLoss):
            return False
        return self.criterion.diagnostics().get("fallbacks", 0.0) > 0

    def _criterion(self) -> Callable[[Tensor, Tensor], Tensor]:
        mean = self.mean = _Mean(self.rows)
        if self.arm.rule is not None:
            mean.candidate = Candidate(self.arm.rule(), len(self.runs), self.rows, self.tally)
            return npl.NewtonLoss(mean, curvature=mean.candidate)
        if self.arm.newton is not None:
            rules = [self.arm.newton(run.second) for run in self.runs]
            return npl.NewtonLoss(mean, curvature=Grouped(rules, self.tally))
        return mean

    def steps(self) -> Iterator[int]:
        """Train; yields the number of steps taken so far."""
        first = self.runs[0]
        batches = self.problem.batches(self.distinct, first.batch, first.steps)
        for step, (inputs, targets) in enumerate(batches, 1):
            self.step(inputs[self.which].to(self.device), targets[self.which].to(self.device))
            yield step

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One step of every replica on (R, N, ...)."""
        candidate = self.mean.candidate
        if candidate is not None and candidate.rule.needs_head:
            outputs, candidate.head_of = self.networks.with_head(inputs)
        else:
            outputs = self.networks(inputs)
        self.alive &= torch.isfinite(outputs.detach()).flatten(1).all(1)
        mask = self.alive.reshape(-1, *[1] * (outputs.ndim - 1))
        outputs = torch.where(mask, outputs, 0.0)  # of a replica that is lost nothing reaches the others
        loss = self.criterion(outputs.flatten(0, 1), targets.flatten(0, 1)) * len(self.runs)
        gradients = list(torch.autograd.grad(loss, self.networks.parameters))
        if self.arm.clips:
            gradients = clip_by_norm(gradients, torch.tensor([run.second for run in self.runs]))
        if self.arm.normalises:
            gradients = self.normalise(gradients)
        self.optimizer.step(gradients)

    def run(self) -> list[dict[str, Any]]:
        """Train to the end, with checkpoints."""
        first = self.runs[0]
        at = {round(first.steps * k / CHECKPOINTS) for k in range(1, CHECKPOINTS + 1)}
        for step in self.steps():
            if step in at:
                self.check(step)
        return [self._result(r) for r in range(len(self.runs))]

    def check(self, step: int) -> None:
        """Add a point to the curves: step, validation and, for a report, test."""
        parts = ("validation", "test") if self.runs[0].purpose == "report" else ("validation",)
        points = [torch.full((len(self.runs),), float(step))]
        for part in parts:
            inputs, targets = self.problem.held_out(part)
            outputs = self.networks.evaluate(inputs.to(self.device))
            self.alive &= torch.isfinite(outputs).flatten(1).all(1)
            share = 100 * self.problem.score(outputs.cpu(), targets).mean(-1)
            points.append(torch.where(self.alive.cpu(), share, 0.0))
        for curve, point in zip(self.curves, torch.stack(points, 1).tolist(), strict=True):
            curve.append([round(value, 3) for value in point])

    def _result(self, r: int) -> dict[str, Any]:
        kept = int(self.tally.kept[r])
        return {
            "curve": self.curves[r],
            "finite": bool(self.alive[r]),
            "kept": kept,
            "device": self.device,
            **self._readings(r),
            **versions(),
        }

    def _readings(self, r: int) -> dict[str, float]:
        """What a rule that looks at the last layer read at the end."""
        rule = None if self.mean.candidate is None else self.mean.candidate.rule
        if not isinstance(rule, Gated):
            return {}
        numbers = {"gate": rule.opened, "signal": rule.share, "lifted": rule.lifted}
        return {name: round(float(x.expand(len(self.runs), 1, 1)[r]), 3) for name, x in numbers.items()}


class _Mean:
    """The mean of the rows' losses; a candidate is told what it may look at besides gradients."""

    def __init__(self, rows: RowsLoss) -> None:
        self.rows = rows
        self.candidate: Candidate | None = None

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        losses = self.rows(outputs, targets)
        if self.candidate is not None:
            self.candidate.watch(outputs.detach(), targets, losses.detach())
        return losses.mean()


@cache
def versions() -> dict[str, str]:
    """What made a line."""
    commit = os.environ.get("EVIDENCE_COMMIT", "")  # for a copy without its repository
    if not commit:
        folder = Path(npl.__file__).parent
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
        commit = git.stdout.strip()
    return {
        "newton_plugin": npl.__version__,
        "commit": commit[:12],
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
