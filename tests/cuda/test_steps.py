"""Every curvature, structure and damping through both doors: the gradients of three steps are those of a CPU."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tests.cuda.device import CPU, DEVICE, error
from tests.cuda.training import TASKS, door, network, train
from torch import Tensor

import newton_plugin as npl

SMALL = ["cross_entropy", "neural_sort", "sorting_network", "curved"]
STRUCTURES = ["auto", "mean", "per_sample", "isotropic", "diagonal"]
OPTIONS = [(c, s, d) for c in ("fisher", "hessian", "auto") for s in STRUCTURES for d in ("auto", 0.1)]
OPTIONS += [("norm", "auto", d) for d in ("auto", 0.1)]


def trained(device: torch.device, name: str, entrance: str, dtype: torch.dtype, **options: Any) -> Tensor:
    task = TASKS[name]
    net = network(task.outputs, device, dtype)
    loss, watched = door(entrance, task.loss, **options)
    gradients = train(net, loss, task.batches(dtype=dtype))
    assert watched.diagnostics()["fallbacks"] == 0
    return gradients


@functools.cache
def expected(name: str, dtype: torch.dtype, options: tuple[tuple[str, Any], ...]) -> Tensor:
    return trained(CPU, name, "LossHook", dtype, **dict(options))


def compare(name: str, entrance: str, dtype: torch.dtype = torch.float64, **options: Any) -> float:
    ours = trained(DEVICE, name, entrance, dtype, **options)
    return error(ours, expected(name, dtype, tuple(options.items())))


@pytest.mark.parametrize("entrance", ["LossHook", "newton_loss"])
@pytest.mark.parametrize(("curvature", "structure", "damping"), OPTIONS)
@pytest.mark.parametrize("name", SMALL)
def test_small_outputs(name: str, curvature: str, structure: str, damping: Any, entrance: str) -> None:
    assert compare(name, entrance, curvature=curvature, structure=structure, damping=damping) <= 1e-9


@pytest.mark.parametrize(("curvature", "structure"), [("fisher", "mean"), ("hessian", "mean"), ("fisher", "diagonal")])
@pytest.mark.parametrize("name", SMALL)
def test_the_inverse_root(name: str, curvature: str, structure: str) -> None:
    assert compare(name, "LossHook", curvature=curvature, structure=structure, damping=0.1, power=0.5) <= 1e-9


@pytest.mark.parametrize(("curvature", "structure", "damping"), [o for o in OPTIONS if o[0] != "auto"])
@pytest.mark.parametrize("name", ["wide", "large"])
def test_wide_and_large_outputs(name: str, curvature: str, structure: str, damping: Any) -> None:
    """Fisher by a system of N x N, the Hessian by Woodbury's formula; rows too many to be converted at once."""
    assert compare(name, "LossHook", curvature=curvature, structure=structure, damping=damping) <= 1e-9


@pytest.mark.parametrize("structure", ["mean", "isotropic"])
def test_wide_outputs_without_a_closed_form(structure: str) -> None:
    """A sketch, and a trace, from random signs that each kind of device draws for itself: not a CPU's numbers."""
    task = TASKS["wide curved"]
    options: dict[str, Any] = {"curvature": "hessian", "structure": structure, "damping": 0.1}
    first = trained(DEVICE, "wide curved", "LossHook", torch.float64, **options)
    assert error(trained(DEVICE, "wide curved", "LossHook", torch.float64, **options), first) <= 1e-7
    (x, t), net = task.batches(1)[0], network(task.outputs, DEVICE)
    taken = npl.newton_step(task.loss, net(x.to(DEVICE)), t.to(DEVICE), **options)
    assert taken.step.device == DEVICE
    assert bool(((taken.step * taken.gradient).sum(-1) > 0).all()), "no step goes uphill"


@pytest.mark.parametrize("structure", ["auto", "mean", "per_sample"])
@pytest.mark.parametrize("curvature", ["fisher", "hessian"])
@pytest.mark.parametrize("name", [*SMALL, "wide", "large"])
def test_float32(name: str, curvature: str, structure: str) -> None:
    """Steps are taken in float64 of what the network computes in float32; a Hessian near 0 shows the rounding more."""
    found = compare(name, "LossHook", torch.float32, curvature=curvature, structure=structure, damping="auto")
    assert found <= {"fisher": 1e-3, "hessian": 1e-2}[curvature]


def test_float64_is_what_steps_are_taken_in() -> None:
    task = TASKS["cross_entropy"]
    (x, t), net = task.batches(1, torch.float32)[0], network(task.outputs, DEVICE, torch.float32)
    taken = npl.newton_step(task.loss, net(x.to(DEVICE)), t.to(DEVICE), structure="mean", damping=1e-4)
    gradient = taken.gradient.double()
    c = gradient.mT @ gradient / len(gradient) + 1e-4 * torch.eye(task.outputs, dtype=torch.float64, device=DEVICE)
    assert error(taken.step, torch.linalg.solve(c, gradient.mT).mT) <= 1e-6
