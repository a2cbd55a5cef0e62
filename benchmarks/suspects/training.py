"""Train stacks of replicas on fixed sets, and look at every sample at every visit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from benchmarks.evidence.rules.gated import Gated
from benchmarks.evidence.rules.rule import Batch
from benchmarks.evidence.training.replicas import Adam, Networks
from benchmarks.suspects.contradiction import Contradiction
from benchmarks.suspects.scores import in_windows, margin
from benchmarks.suspects.tasks import Data, Task
from torch import Tensor

__all__ = ["BATCH", "EPOCHS", "fit", "watched"]

EPOCHS, BATCH = 15, 32
Look = Callable[[int, Tensor, dict[str, Tensor]], None]


def fit(
    task: Task,
    data: Sequence[Data],
    seeds: Sequence[int],
    rates: Sequence[float],
    gated: bool = False,
    members: Tensor | None = None,
    epochs: int = EPOCHS,
    look: Look | None = None,
) -> Networks:
    """Train R networks by Adam, rates decaying to zero by a cosine; an epoch is one pass in random order.

    Samples that do not fill a batch at the end of an epoch are left out of it.

    Args:
        task: the loss and the network.
        data: of each replica.
        seeds: of each replica's weights, order and noise.
        rates: of each replica.
        gated: take the gated step in place of the gradient.
        members: the samples that each replica trains on, (R, M); None: all.
        epochs: passes.
        look: is called at each batch, before its step, with the epoch, the samples (R, B), and what is known of them:
            ``outputs`` (R, B, ...), ``targets``, ``loss`` (R, B), ``gradient`` (R, B, m), ``head`` (R, B, D).
    """
    inputs, targets = torch.stack([d.inputs for d in data]), torch.stack([d.targets for d in data])
    replicas, count = targets.shape[:2]
    members = torch.arange(count).expand(replicas, -1) if members is None else members
    batches = members.shape[1] // BATCH
    networks = Networks(task.problem.network, seeds)
    optimizer = Adam(networks.parameters, rates, epochs * batches)
    rows = task.problem.loss(task.sharpness, seeds, False)
    rule, which = Gated() if gated else None, torch.arange(replicas).unsqueeze(1)
    orders = [torch.Generator().manual_seed(seed) for seed in seeds]
    for epoch in range(epochs):
        order = torch.stack([torch.randperm(members.shape[1], generator=g) for g in orders])
        for index in members.gather(1, order)[:, : batches * BATCH].split(BATCH, 1):
            outputs, head_of = networks.with_head(inputs[which, index])
            at = outputs.detach().requires_grad_()
            asked = targets[which, index]
            loss = rows(at.flatten(0, 1), asked.flatten(0, 1))
            (gradient,) = torch.autograd.grad(loss.sum(), at)
            g, loss = gradient.reshape(replicas, BATCH, -1), loss.detach().reshape(replicas, BATCH)
            if look is not None:
                seen = {"outputs": at.detach(), "targets": asked, "loss": loss, "gradient": g, "head": head_of(g)}
                look(epoch, index, seen)
            if rule is not None:
                g = _gated(rule, g, loss, at.detach(), head_of)
            optimizer.step(torch.autograd.grad(outputs, networks.parameters, g.reshape(outputs.shape) / BATCH))
    return networks


def _gated(rule: Gated, g: Tensor, loss: Tensor, outputs: Tensor, head_of: Callable[[Tensor], Tensor]) -> Tensor:
    def unused(*_: object) -> Tensor:
        raise AssertionError("the gated rule looks at gradients and at the last layer alone")

    wide = g.double()
    batch = Batch(wide, loss.double(), outputs.reshape(g.shape).double(), unused, unused, lambda: head_of(wide))
    return rule.step(batch).to(g.dtype)


def watched(
    task: Task,
    data: Sequence[Data],
    seeds: Sequence[int],
    rates: Sequence[float],
    gated: bool = False,
    epochs: int = EPOCHS,
) -> tuple[Networks, list[dict[str, Tensor]]]:
    """Train, and score every sample of every replica by all that a training tells.

    Returns:
        The networks, and for each replica scores (K,) by name; higher is more suspect.
    """
    replicas, count = len(data), len(data[0].wrong)
    contradiction, which = Contradiction(), torch.arange(replicas).unsqueeze(1)
    records: dict[str, Tensor] = {}

    def look(epoch: int, index: Tensor, seen: dict[str, Tensor]) -> None:
        found = {
            "loss": seen["loss"],
            "gradient": seen["gradient"].norm(dim=-1),
            "head gradient": seen["head"].norm(dim=-1),
        }
        if task.has_classes:
            found["margin"] = -margin(seen["outputs"], seen["targets"])
        found |= {f"contradiction: {k}": v for k, v in contradiction(seen["gradient"], seen["head"]).items()}
        for name, value in found.items():
            empty = torch.full((replicas, epochs, count), torch.nan, dtype=torch.float64)
            records.setdefault(name, empty)[which, epoch, index] = value.double()

    networks = fit(task, data, seeds, rates, gated, epochs=epochs, look=look)
    scores: list[dict[str, Tensor]] = []
    for r in range(replicas):
        of_one: dict[str, Tensor] = {}
        for name, record in records.items():
            of_one |= in_windows(name, record[r])
        scores.append(of_one)
    return networks, scores
