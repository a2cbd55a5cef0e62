"""Train one live run: an ordinary loop of PyTorch, with the hook of an arm before ``backward()``."""

from __future__ import annotations

import math
from typing import Any

import torch
from benchmarks.evidence.data.images import Part
from benchmarks.evidence.live.problems import LiveProblem
from benchmarks.evidence.training.arms import Arm
from benchmarks.evidence.training.replicas import NormaliseByNorm
from benchmarks.evidence.training.runs import Run
from benchmarks.evidence.training.train import CHECKPOINTS, versions
from torch import Tensor

import newton_plugin as npl

__all__ = ["Training", "hook_of"]


def hook_of(arm: Arm, second: float | None) -> npl.LossHook | None:
    """The arm's own hook, or one with its curvature and damping; None for plain training.

    Raises:
        ValueError: a candidate of the search, which sees stacks of replicas only.
    """
    if arm.newton is None:
        if arm.rule is not None:
            raise ValueError("arm: a rule without a curvature of the package needs stacks of replicas; got one.")
        return None
    curvature, damping = arm.newton(second)
    return npl.LossHook(curvature=curvature, damping=damping)


class Training:
    """One run.

    Args:
        problem, arm, run: what, how, and with which numbers; data, weights, batches and noise follow from the seed.
    """

    def __init__(self, problem: LiveProblem, arm: Arm, run: Run) -> None:
        self.problem, self.arm, self.run = problem, arm, run
        self.data = problem.task.training(run.seed)
        torch.manual_seed(run.seed)
        self.network = problem.task.network()
        self.parameters = list(self.network.parameters())
        if problem.optimizer == "adam":
            self.optimizer: torch.optim.Optimizer = torch.optim.Adam(
                self.parameters, run.learning_rate, betas=(0.9, arm.beta2)
            )
        else:
            self.optimizer = torch.optim.SGD(self.parameters, run.learning_rate, momentum=0.9)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda taken: (1 + math.cos(math.pi * taken / run.steps)) / 2
        )
        self.hook = hook_of(arm, run.second)
        self.normalise = NormaliseByNorm()
        self.batches = torch.Generator().manual_seed(run.seed)
        self.noise = torch.Generator().manual_seed(run.seed + 10**6)

    def _batch(self) -> tuple[Tensor, ...]:
        count = len(self.data[0])
        if self.run.batch == count:
            return self.data
        index = torch.randint(count, (self.run.batch,), generator=self.batches)
        return tuple(values[index] for values in self.data)

    def step(self) -> None:
        """One step on the next batch."""
        self.optimizer.zero_grad()
        loss = self.problem.task.loss(self.network, self._batch(), self.noise)
        (loss if self.hook is None else self.hook(loss)).backward()
        if self.arm.clips:
            assert self.run.second is not None
            torch.nn.utils.clip_grad_norm_(self.parameters, self.run.second)
        if self.arm.normalises:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            scaled = self.normalise([g.unsqueeze(0) for g in gradients])
            for g, s in zip(gradients, scaled, strict=True):
                g.copy_(s.squeeze(0))
        self.optimizer.step()
        self.schedule.step()

    def result(self) -> dict[str, Any]:
        """Train to the end: what a line holds. A run that leaves the finite numbers is not trained further."""
        parts: list[Part] = ["validation", "test"] if self.run.purpose == "report" else ["validation"]
        at = {round(self.run.steps * k / CHECKPOINTS) for k in range(1, CHECKPOINTS + 1)}
        curve, finite = [], True
        torch.manual_seed(self.run.seed)  # a curvature may draw probes
        for step in range(1, self.run.steps + 1):
            if finite:
                self.step()
            if step in at:
                scores = [self._score(part) for part in parts] if finite else []
                finite = finite and all(map(math.isfinite, scores))
                curve.append([float(step), *(scores if finite else [0.0] * len(parts))])
        found = {} if self.hook is None else self.hook.diagnostics()
        readings = {name: round(found[name], 3) for name in ("gate", "signal", "lifted") if name in found}
        kept = int(found.get("fallbacks", 0))
        return {"curve": curve, "finite": finite, "kept": kept, "device": "cpu", **readings, **versions()}

    @torch.no_grad()
    def _score(self, part: Part) -> float:
        """Between 0 and 100; NaN where a parameter or the score is not finite."""
        score = float(self.problem.task.score(self.network, part))
        if not math.isfinite(score) or not all(bool(p.isfinite().all()) for p in self.parameters):
            return math.nan
        return round(min(max(score, 0.0), 100.0), 3)
