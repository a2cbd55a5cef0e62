"""The three doors, each driven through the five batches of a problem."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Literal

import torch
from benchmarks.versions.case import Record
from benchmarks.versions.problems import Problem
from torch import Tensor

import newton_plugin as npl

__all__ = ["DOORS", "Door", "Reduction"]

Reduction = Literal["mean", "sum"]
Door = Callable[[Record, Problem, Reduction, dict[str, Any]], None]

_FIRST_HALF = 3  # steps; in the second half another object goes on from the first one's state


def loss_hook(record: Record, problem: Problem, reduction: Reduction, given: dict[str, Any]) -> None:
    """``LossHook``: a second hook goes on from the state of the first, or from that of another version."""

    def make() -> Any:
        return npl.LossHook(module=problem.model, reduction=reduction, **given, **problem.hook, **problem.every)

    hook = make()
    record.put("repr", repr(hook))
    for k, (x, target) in enumerate(problem.batches):
        if k == _FIRST_HALF:
            with record.attempt("state"):
                state = record.hand_over(hook.state_dict())
                hook.detach()
                hook = make()
                hook.load_state_dict(state)
        with record.attempt(f"step {k}"):
            with hook.watch(), _autocast(problem):
                outputs = _outputs(problem, x)
                loss = problem.loss(*outputs, target)
            loss = hook(loss, problem.names[k % len(problem.names)])
            _backward(record, problem, k, loss, outputs)
            _diagnose(record, problem, k, hook)


def newton_loss(record: Record, problem: Problem, reduction: Reduction, given: dict[str, Any]) -> None:
    """``newton_loss``: its running state is in no state_dict, so a copy goes on."""
    wrapped = npl.newton_loss(problem.loss, reduction=reduction, **given, **problem.wrap, **problem.every)
    record.put("repr", repr(wrapped).replace(repr(problem.loss), "loss"))
    for k, (x, target) in enumerate(problem.batches):
        if k == _FIRST_HALF:
            with record.attempt("copy"):
                wrapped = copy.deepcopy(wrapped)
        with record.attempt(f"step {k}"):
            with _autocast(problem):
                outputs = _outputs(problem, x)
                loss = wrapped(*outputs, target)
            if loss.ndim:
                record.put(f"step {k}, losses", loss)
                loss = loss.mean() if reduction == "mean" else loss.sum()
            _backward(record, problem, k, loss, outputs)
            _diagnose(record, problem, k, wrapped)


def newton_step(record: Record, problem: Problem, reduction: Reduction, given: dict[str, Any]) -> None:
    """``newton_step`` of the first outputs, the others held: it remembers nothing."""
    for k, (x, target) in enumerate(problem.batches[:_FIRST_HALF]):
        with record.attempt(f"step {k}"):
            with torch.no_grad(), _autocast(problem):
                first, *others = _outputs(problem, x)
            taken = npl.newton_step(problem.loss, first, *others, target, reduction=reduction, **given, **problem.every)
            record.put(f"step {k}", taken._asdict())


DOORS: dict[str, Door] = {"LossHook": loss_hook, "newton_loss": newton_loss, "newton_step": newton_step}


def _outputs(problem: Problem, x: Tensor) -> tuple[Tensor, ...]:
    y = problem.model(x)
    outputs = y if isinstance(y, tuple) else (y,)
    if problem.watched and torch.is_grad_enabled():
        for tensor in outputs:
            tensor.retain_grad()
    return outputs


def _autocast(problem: Problem) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if problem.autocast else nullcontext()


def _backward(record: Record, problem: Problem, k: int, loss: Tensor, outputs: tuple[Tensor, ...]) -> None:
    """Backward passes, and the gradients of all parameters."""
    record.put(f"step {k}, loss", loss)
    problem.model.zero_grad()
    for last in reversed(range(problem.passes)):
        (problem.factor * loss).backward(retain_graph=last > 0)
    record.put(f"step {k}, gradients", dict(_gradients(problem)))
    if problem.watched:
        record.put(f"step {k}, at the outputs", [y.grad for y in outputs])


def _gradients(problem: Problem) -> Iterator[tuple[str, Tensor | None]]:
    return ((name, p.grad) for name, p in problem.model.named_parameters())


def _diagnose(record: Record, problem: Problem, k: int, door: Any) -> None:
    if problem.diagnosed:
        numbers = door.diagnostics()
        # The smallest eigenvalue is rounding where C is singular: it is compared on the scale of the largest.
        ends = torch.tensor([numbers.pop(e) for e in ("eig_min", "eig_max") if e in numbers], dtype=torch.float64)
        record.put(f"step {k}, diagnostics", {**numbers, "eigenvalues": ends})
