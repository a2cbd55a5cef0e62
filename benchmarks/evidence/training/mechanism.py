r"""Why a rule helps: what it does to the signal and the noise in the gradient of a batch.

Measured on a network after some steps of plain training, over K batches of one size, with g_i the gradient at the
outputs:

* **directions**: C = mean g g', its eigenvalues l_1 >= ... >= l_m and eigenvectors. ``spread`` is l_1 over the mean
  eigenvalue (1: C is a multiple of the identity, and no direction can matter).
* **noise of a loss that samples**: two independent draws g, g' of the same sample share the signal, so along
  eigenvector u the share of signal is ``E (u'g)(u'g') / E (u'g)^2``. Whitening divides by sqrt(l) or l: if the small l
  have no signal, it amplifies noise. The share is given for the third of the directions with the largest l, and for
  the third with the smallest.
* **samples**: ``tail``, the share of sum |g_i|^2 that a tenth of the samples holds.
* **batches**: signal-to-noise of the parameters' gradient, ``|G|^2 / mean |G_k - G|^2`` for the K batches and their
  mean G, when a rule makes the steps. Its ratio to that of plain training is what one batch is worth.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.evidence.problems.problem import Problem
from benchmarks.evidence.training.arms import ARMS, BASELINE
from benchmarks.evidence.training.plan import search_runs
from benchmarks.evidence.training.train import Trainer, versions
from torch import Tensor

__all__ = ["append_mechanism", "look"]

BATCHES = 48


def _steps(g: Tensor, c: Tensor) -> dict[str, Tensor]:
    """Steps of all samples (K, B, m) by rules that know C and mean |g|^2 exactly."""
    squared = g.square().sum(-1, keepdim=True)
    s = squared.mean()
    values, vectors = torch.linalg.eigh(c)
    damped = values.clamp_min(0) + 0.3 * values.square().mean().sqrt()
    return {
        "plain": g,
        "soft normalisation": g / (squared + 0.1 * s).sqrt(),
        "whitened (C + d)^-1/2": g @ vectors * damped.rsqrt() @ vectors.mT,
        "Fisher (C + d)^-1": g @ vectors / damped @ vectors.mT,
    }


def look(problem: Problem, share: float) -> dict[str, Any]:
    """All figures of one problem after a share of the plain training."""
    run = next(r for r in search_runs(problem, BASELINE, 1) if r.learning_rate == 1e-2)
    trainer = Trainer(problem, ARMS[BASELINE], [run])
    for step in trainer.steps():
        if step >= share * run.steps:
            break
    parameters = trainer.networks.parameters
    gradients, again, networks = [], [], []
    for inputs, targets in problem.batches([run.seed + 1], run.batch, BATCHES):
        outputs = trainer.networks(inputs)[0]
        pair = [_gradient(trainer, outputs, targets[0]) for _ in range(2)]
        gradients.append(pair[0].flatten(1))
        again.append(pair[1].flatten(1))
        networks.append(outputs)
    g, other = torch.stack(gradients).double(), torch.stack(again).double()
    rows, others = g.flatten(0, 1), other.flatten(0, 1)
    c = rows.mT @ rows / len(rows)
    values, vectors = torch.linalg.eigh(c)
    keep = values > 1e-9 * values[-1]  # a ranking loss does not change when all scores move: no direction
    signal = ((rows @ vectors) * (others @ vectors)).mean(0)[keep] / values[keep]
    third = max(1, int(keep.sum()) // 3)
    squared = rows.square().sum(-1).sort(descending=True).values
    result: dict[str, Any] = {
        "spread": float(values[-1] / values[keep].mean()),
        "signal_largest": float(signal[-third:].mean()),
        "signal_smallest": float(signal[:third].mean()),
        "tail": float(squared[: len(squared) // 10].sum() / squared.sum()),
    }
    for name, steps in _steps(g, c).items():
        result[name] = _signal_to_noise(networks, steps.to(networks[0].dtype), parameters)
    return result


def _gradient(trainer: Trainer, outputs: Tensor, targets: Tensor) -> Tensor:
    y = outputs.detach().requires_grad_()
    (g,) = torch.autograd.grad(trainer.rows(y, targets).sum(), y)
    return g


def _signal_to_noise(outputs: Sequence[Tensor], steps: Tensor, parameters: list[Tensor]) -> float:
    """Of the parameters' gradients over the batches; the mean's own noise is taken off its square."""
    each = []
    for y, step in zip(outputs, steps, strict=True):
        found = torch.autograd.grad(y, parameters, step.reshape(y.shape) / len(y), retain_graph=True)
        each.append(torch.cat([f.flatten() for f in found]).double())
    batch = torch.stack(each)
    mean = batch.mean(0)
    noise = (batch - mean).square().sum(-1).sum() / (len(batch) - 1)
    return float((mean.square().sum() - noise / len(batch)) / noise)


def append_mechanism(path: Path, problem: Problem) -> None:
    """Look at a tenth, at half and at the end of the training; one line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for share in (0.1, 0.5, 1.0):
        row = {"problem": problem.name, "share": share, **look(problem, share), **versions()}
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
