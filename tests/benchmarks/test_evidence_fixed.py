"""The paper's scale: which runs it consists of, what its table shows, and its network's replicas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmarks.evidence.problems.registry import problems
from benchmarks.evidence.tables.fixed import fixed_table
from benchmarks.evidence.training.arms import BASELINE
from benchmarks.evidence.training.fixed import FIXED_ARMS, fixed_groups
from benchmarks.evidence.training.plan import sharpness_runs, tuning_runs
from benchmarks.evidence.training.replicas import Networks
from benchmarks.evidence.training.runs import Run
from torch import nn

SMALL, PAPER = problems()["logistic_5"], problems("paper")["logistic_5"]


def _tuned() -> dict[Run, dict]:
    """Lines in which the baseline is best at steepness 10."""
    runs = [*sharpness_runs(SMALL, "digits", "cpu"), *tuning_runs(SMALL, BASELINE, 10.0, "digits", "cpu")]
    return {run: {"curve": [[1.0, float(run.sharpness == 10.0)]], "finite": True} for run in runs}


def test_runs_take_the_sharpness_that_was_chosen_at_the_small_scale() -> None:
    groups = list(fixed_groups(PAPER, SMALL, _tuned(), (BASELINE, "isotropic"), (1e-3, 3e-3), 3, "mnist"))
    assert [{run.arm for run in group} for group in groups] == [{BASELINE}, {"isotropic"}]
    assert {(run.learning_rate, run.seed) for run in groups[0]} == {
        (r, 5000 + s) for r in (1e-3, 3e-3) for s in range(3)
    }
    assert {(run.sharpness, run.scale, run.data, run.steps, run.batch) for run in groups[1]} == {
        (10.0, "paper", "mnist", 100_000, 100)
    }
    with pytest.raises(LookupError, match="has no line yet"):
        next(iter(fixed_groups(PAPER, SMALL, {}, FIXED_ARMS, (1e-3,), 1, "mnist")))


def test_the_table_by_hand() -> None:
    made = {"finite": True, "newton_plugin": "0", "commit": "c", "torch": "2", "device": "cuda"}
    run = Run("logistic_5", BASELINE, 1e-3, None, 3.0, 50, 100, 5000, "report", "mnist", "paper")
    done = {}
    for seed, plain, ours in ((5000, 50.0, 53.0), (5001, 60.0, 59.0)):
        for arm, value in ((BASELINE, plain), ("isotropic", ours)):
            curve = [[5.0, 0.0, 1.0], [10.0, 0.0, value / 2], [50.0, 0.0, value]]
            done[replace(run, seed=seed, arm=arm)] = {"curve": curve, **made}
    done[replace(run, arm="Fisher")] = {**done[run], "finite": False}
    table = fixed_table(done, {"logistic_5": PAPER})
    assert "| plain, stable | 27.5 (25.0 to 30.0) | 55.0 (50.0 to 60.0) |" in table
    assert (
        "| isotropic | 28.0 (26.5 to 29.5); +0.5 (-0.5 to +1.5) | 56.0 (53.0 to 59.0); +1.0 (-1.0 to +3.0) |" in table
    )
    assert "| Fisher | 0.0 (0.0 to 0.0); -25.0 (-25.0 to -25.0) |" in table  # a lost run counts as zero
    assert "50 steps, sharpness 3" in table


def test_replicas_of_a_convolutional_network_are_those_of_each_alone() -> None:
    make = lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 1))  # noqa: E731
    networks, x = Networks(make, [1, 2]), torch.randn(2, 5, 1, 8, 8)
    outputs = networks(x)
    gradients = torch.autograd.grad(outputs.square().sum(), networks.parameters)
    for r, seed in enumerate((1, 2)):
        torch.manual_seed(seed)
        alone = make()
        y = alone(x[r])
        torch.testing.assert_close(outputs[r], y)
        torch.testing.assert_close(networks.evaluate(x[0])[r], alone(x[0]))
        for ours, theirs in zip(
            gradients, torch.autograd.grad(y.square().sum(), list(alone.parameters())), strict=True
        ):
            torch.testing.assert_close(ours[r], theirs)
