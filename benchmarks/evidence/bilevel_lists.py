"""A bilevel problem: the weights of noisy ranking lists are learned while the network trains.

Runs are trained one at a time, not as replicas; their lines and tables have the form of the other problems'.

    python -m benchmarks.evidence.bilevel_lists tune && python -m benchmarks.evidence.bilevel_lists report

400 training lists of five digits, 30 % of them in a random order. The lower level trains the network on all of them,
each with a weight of its own; the upper level moves the weights (MA-SOBA) so that the network ranks 100 clean lists
well. An arm is what the lower level descends: the loss itself, or its Newton surrogate, whose target is made once a
step. Every arm is also trained without an upper level, all weights 1: that tells whether a gain comes from the weights
or from the step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from benchmarks.evidence.data.images import Part
from benchmarks.evidence.data.number_lists import NumberLists
from benchmarks.evidence.training import plan
from benchmarks.evidence.training.arms import ARMS, BASELINE, TWO_RATES, Arm, configurations
from benchmarks.evidence.training.runs import TUNING_SEEDS, Lines, Purpose, Run
from benchmarks.evidence.training.train import CHECKPOINTS, versions
from torch import Tensor, nn

import newton_plugin as npl
from newton_plugin.algorithms import RankingLoss
from newton_plugin.bilevel import MASOBA, NotConvergedError

__all__ = ["BILEVEL", "BilevelLists", "Training", "found_lists"]

SHOWN = (BASELINE, "soft normalisation", "isotropic", "our rule", "gated, plain size")
LR_UPPER, BETA, DECAY, N = 100.0, 0.9, 1e-3, 5
RESULTS = Path(__file__).parent.parent / "results" / "evidence"


@dataclass(frozen=True)
class BilevelLists:
    """The attributes of a problem that the plan of the runs and the tables read; :class:`Training` trains it.

    Attributes:
        weighted: whether there is an upper level.
        uppers: its learning rates to choose from, the second number of a run; empty: LR_UPPER, and none to choose.
    """

    name: str
    title: str
    weighted: bool
    table: str = "beyond"
    steps: int = 400
    batch: int = 64
    lists: int = 400
    clean: int = 100
    wrong: float = 0.3
    temperature: float = 1.0
    sharpnesses: tuple[float, ...] = (1.0,)
    uppers: tuple[float, ...] = ()
    optimizer: str = "sgd"
    without: tuple[str, ...] = field(default=tuple(arm for arm in ARMS if arm not in SHOWN))

    @property
    def grid(self) -> list[tuple[float, float | None]]:
        """Six configurations (learning rate, second number), the same for all arms; see ``arms.configurations``."""
        if self.uppers:
            return [(10 * rate, upper) for rate in TWO_RATES for upper in self.uppers]
        return configurations(ARMS[BASELINE], self.optimizer)


BILEVEL: dict[str, BilevelLists] = {
    p.name: p
    for p in (
        BilevelLists("noisy_weighted", "30 % wrong lists, learned weights", weighted=True),
        BilevelLists("noisy_equal", "the same lists, equal weights", weighted=False),
        # Added when the first had been looked at: was it the upper learning rate, which no arm had chosen?
        BilevelLists(
            "noisy_upper",
            "30 % wrong lists, both rates chosen",
            weighted=True,
            table="upper",
            uppers=(30.0, 100.0, 300.0),
        ),
    )
}


class Training:
    """One run.

    Args:
        problem, arm, run: what, how, and with which numbers; data, weights and batches follow from the run's seed.
    """

    def __init__(self, problem: BilevelLists, arm: Arm, run: Run) -> None:
        self.problem, self.run, seed = problem, run, run.seed
        lists = NumberLists("train", N, 1)
        ((self.images, ranks),) = lists.draw(1, problem.lists, seed)
        ((self.clean_images, self.clean_ranks),) = lists.draw(1, problem.clean, seed + 10**6)
        self.generator = torch.Generator().manual_seed(seed)
        self.wrong = torch.rand(len(ranks), generator=self.generator) < problem.wrong
        shuffled = torch.rand(ranks.shape, generator=self.generator).argsort(-1)
        self.ranks = torch.where(self.wrong.unsqueeze(-1), shuffled, ranks)
        torch.manual_seed(seed)
        layers = [nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 1)]
        self.network = nn.Sequential(nn.Flatten(-2), *layers, nn.Flatten(-2))
        self.logits = torch.zeros(len(ranks), requires_grad=True)
        self.each = RankingLoss("neural_sort", temperature=problem.temperature, reduction="none")
        self.hook = None
        if arm.newton is not None:
            curvature, damping = arm.newton(None)
            self.hook = npl.LossHook(curvature=curvature, damping=damping)
        rate, upper = run.learning_rate, LR_UPPER if run.second is None else run.second
        self.both = MASOBA([self.logits], self.network.parameters(), lr_upper=upper, lr_lower=rate, beta=BETA)
        self.alone = torch.optim.SGD(self.network.parameters(), lr=rate)
        self.taken = 0

    def _mean(self, scores: Tensor, ranks: Tensor) -> Tensor:
        return self.each(scores, ranks).mean()

    def _target(self, batch: Tensor) -> Tensor:
        """What the rule wants the scores to be: a constant, made where the step starts. The rule sees the network."""
        assert self.hook is not None
        scores = self.network(self.images[batch])
        loss = N * N * self._mean(scores, self.ranks[batch])  # that of plain training: a rule may keep its length
        (gradient,) = torch.autograd.grad(self.hook(loss), scores)
        return scores.detach() - len(batch) * gradient  # the loss is a mean, its gradient step / N

    def step(self) -> None:
        """One step of the lower level; after a fifth of the training one of the upper level with it."""
        batch = torch.randint(len(self.ranks), (self.run.batch,), generator=self.generator)
        target = None if self.hook is None else self._target(batch)

        def lower() -> Tensor:
            scores = self.network(self.images[batch])
            if target is None:
                losses = N * N * self.each(scores, self.ranks[batch])  # summed: SGD's grid is then wide enough
            else:
                losses = (scores - target).square().sum(-1) / 2
            weights = 2 * self.logits[batch].sigmoid()  # 1 at the start
            return (weights * losses).mean() + DECAY * sum(p.square().sum() for p in self.network.parameters())

        def upper() -> Tensor:
            return self._mean(self.network(self.clean_images), self.clean_ranks)

        if self.problem.weighted and self.taken >= self.run.steps // 5:
            self.both.step(upper, lower)
        else:
            self.alone.zero_grad()
            lower().backward()
            self.alone.step()
        self.taken += 1

    def result(self) -> dict[str, Any]:
        """Train to the end: what a line holds."""
        parts: list[Part] = ["validation", "test"] if self.run.purpose == "report" else ["validation"]
        at = {round(self.run.steps * k / CHECKPOINTS) for k in range(1, CHECKPOINTS + 1)}
        curve, finite = [], True
        for step in range(1, self.run.steps + 1):
            if finite:
                try:
                    self.step()
                except (npl.NewtonPluginError, NotConvergedError):
                    finite = False  # the optimizer refuses a step that is not finite
                finite = finite and all(bool(p.isfinite().all()) for p in self.network.parameters())
            if step in at:
                curve.append([float(step), *(self._score(part) if finite else 0.0 for part in parts)])
        found = {"auroc": self._auroc()} if self.problem.weighted else {}
        return {"curve": curve, "finite": finite, "kept": 0, "device": "cpu", **found, **versions()}

    @torch.no_grad()
    def _score(self, part: Part) -> float:
        """Per cent of the lists that are ranked right from the first to the last."""
        images, ranks = _held_out(part)
        return round(100 * float((self.network(images).argsort(-1).argsort(-1) == ranks).all(-1).double().mean()), 3)

    def _auroc(self) -> float:
        """How well low weights find wrong lists: the chance that a wrong one has less than a right one."""
        weights = self.logits.detach()
        less = weights[self.wrong].unsqueeze(-1) - weights[~self.wrong]
        return round(float(((less < 0).double() + (less == 0).double() / 2).mean()), 4)


@cache
def _held_out(part: Part) -> tuple[Tensor, Tensor]:
    ((images, ranks),) = NumberLists(part, N, 1).draw(1, 1000, {"validation": 1, "test": 2}[part])
    return images, ranks


def runs(problem: BilevelLists, arm: str, purpose: Purpose, lines: Lines) -> list[Run]:
    """As for every other problem: six configurations on the tuning seeds, the chosen one on the report's."""
    tuning = [
        Run(problem.name, arm, rate, second, problem.temperature, problem.steps, problem.batch, seed, "tune")
        for rate, second in problem.grid
        for seed in TUNING_SEEDS
    ]
    if purpose == "tune":
        return tuning
    return plan.report_runs(problem, plan.best_run(tuning, lines.by_run()), "digits", "cpu")  # type: ignore[arg-type]


def found_lists(done: plan.Done) -> str:
    """How well each arm's weights find the wrong lists; nothing where no weights were learned."""
    parts = []
    for problem in BILEVEL.values():
        found: dict[str, list[float]] = {}
        for run, row in done.items():
            if run.problem == problem.name and run.purpose == "report" and "auroc" in row:
                found.setdefault(run.arm, []).append(row["auroc"])
        if found:
            listed = ", ".join(f"{arm}: {statistics.mean(values):.3f}" for arm, values in found.items())
            parts.append(
                f"\n{problem.title}: area under the ROC curve of low weights as a sign of wrong lists, {listed}.\n"
            )
    return "".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tune", "report"])
    parser.add_argument("--problems", nargs="+", choices=BILEVEL, default=[*BILEVEL])
    parser.add_argument("--arms", nargs="+", choices=SHOWN, default=SHOWN, metavar="ARM")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for problem in (BILEVEL[name] for name in options.problems):
        lines = Lines(options.out / f"{problem.table}.jsonl")
        for arm in options.arms:
            start, missing = time.process_time(), lines.missing(runs(problem, arm, options.what, lines))
            for run in missing:
                lines.append(run, Training(problem, ARMS[arm], run).result())
            seconds = time.process_time() - start
            print(f"{options.what}: {problem.name}, {arm}: {len(missing)} runs, {seconds:.0f} s of CPU", flush=True)


if __name__ == "__main__":
    main()
