"""The time of a training step of each arm, measured alone: the runs themselves share the machine with other work."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.training.arms import ARMS, Arm
from benchmarks.evidence.training.train import versions
from torch import Tensor, nn

import newton_plugin as npl

__all__ = ["append_times", "measure_steps", "ordinary_step", "read_times"]

_WARM_UP = 5


def ordinary_step(problem: Problem, arm: Arm, seed: int = 0) -> Callable[[Tensor, Tensor], None]:
    """A step as a user writes it: one network, torch.optim, the package's loss; call it with a batch."""
    torch.manual_seed(seed)
    network = problem.network()
    if problem.optimizer == "adam":
        optimizer = torch.optim.Adam(network.parameters(), 1e-2, betas=(0.9, arm.beta2))
    else:
        optimizer = torch.optim.SGD(network.parameters(), 1e-1, momentum=0.9)
    sharp = problem.sharpnesses[len(problem.sharpnesses) // 2] if problem.sharpnesses else None
    rows = problem.loss(sharp, [seed], arm.textbook)
    second = arm.second[len(arm.second) // 2] if arm.second else None

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        return rows(outputs, targets).mean()

    loss_fn: Callable[[Tensor, Tensor], Tensor] = criterion
    if arm.newton is not None:
        curvature, damping = arm.newton(second)
        loss_fn = npl.NewtonLoss(criterion, curvature=curvature, damping=damping)
    size = torch.ones(())

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        loss_fn(network(inputs), targets).backward()
        if arm.clips:
            assert second is not None
            nn.utils.clip_grad_norm_(network.parameters(), second)
        if arm.normalises:
            gradients = [p.grad for p in network.parameters() if p.grad is not None]
            size.mul_(0.9).add_(0.1 * sum(g.square().sum() for g in gradients))
            torch._foreach_div_(gradients, size.sqrt())
        optimizer.step()

    return step


def measure_steps(problem: Problem, rounds: int = 30, arms: Iterable[str] = ARMS) -> dict[str, float]:
    """Milliseconds a step, medians; the arms take turns, one step each a round."""
    batches = list(problem.batches([0], problem.batch, rounds + _WARM_UP))
    steps = {name: ordinary_step(problem, ARMS[name]) for name in arms if name not in problem.without}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for inputs, targets in batches:
        for name, step in steps.items():
            start = time.perf_counter()
            step(inputs[0], targets[0])
            taken[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values[_WARM_UP:]) for name, values in taken.items()}


def append_times(path: Path, problem: Problem, rounds: int) -> dict[str, float]:
    """Measure, and add one line to a file."""
    times = measure_steps(problem, rounds)
    row = {"problem": problem.name, "ms_per_step": times, "rounds": rounds, **versions()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    return times


def read_times(path: Path) -> dict[str, dict[str, float]]:
    """The last measurement of each problem."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["problem"]: row["ms_per_step"] for row in rows}
