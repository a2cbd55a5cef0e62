"""The host never waits for the device in a training step, except where a curvature has to read a number back.

``tests/step/test_no_sync.py`` asks the same of the operations that a CPU sees; here CUDA itself is asked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tests.cuda.device import DEVICE, cuda_alone
from tests.cuda.training import TASKS, Loss, door, network
from torch import Tensor

import newton_plugin as npl

pytestmark = cuda_alone
WAITS = "synchronizing CUDA operation"


@pytest.fixture(autouse=True)
def default_mode() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def steps(name: str, loss: Loss) -> Callable[[], None]:
    """A function that makes one training step; all data are on the device before."""
    task = TASKS[name]
    net = network(task.outputs, DEVICE)
    x, t = (part.to(DEVICE) for part in task.batches(1)[0])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        loss(net(x), t).backward()
        optimizer.step()

    return step


def never_waits(name: str, loss: Loss, watched: Any) -> None:
    step = steps(name, loss)
    step()  # memory, handles of libraries, constants of the loss
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(3):
        step()
    with pytest.raises(RuntimeError, match=WAITS):
        watched.diagnostics()
    torch.cuda.set_sync_debug_mode("default")
    assert watched.diagnostics()["fallbacks"] == 0


def test_cuda_tells_of_waiting() -> None:
    value = torch.ones((), device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match=WAITS):
        value.item()


FISHER = [
    {},
    *({"structure": s, "damping": d} for s in ("mean", "per_sample", "isotropic", "diagonal") for d in ("auto", 0.1)),
    {"curvature": "norm"},
    # Not "mean": torch.linalg.eigh looks whether it converged.
    *({"structure": s, "power": 0.5} for s in ("per_sample", "isotropic", "diagonal")),
]


@pytest.mark.parametrize("entrance", ["LossHook", "newton_loss"])
@pytest.mark.parametrize("options", FISHER, ids=str)
def test_fisher_never_waits(options: dict[str, Any], entrance: str) -> None:
    never_waits("cross_entropy", *door(entrance, TASKS["cross_entropy"].loss, **options))


@pytest.mark.parametrize("damping", ["auto", 0.1])
@pytest.mark.parametrize("structure", ["auto", "mean", "per_sample", "diagonal"])
@pytest.mark.parametrize("name", ["wide", "large"])
def test_nor_with_wide_and_large_outputs(name: str, structure: str, damping: Any) -> None:
    never_waits(name, *door("LossHook", TASKS[name].loss, structure=structure, damping=damping))


@pytest.mark.parametrize("name", ["neural_sort", "sorting_network"])
def test_nor_do_the_sorting_losses(name: str) -> None:
    never_waits(name, *door("LossHook", TASKS[name].loss))


@pytest.mark.parametrize("structure", ["isotropic", "diagonal"])
def test_nor_does_a_hessian_without_a_factorisation(structure: str) -> None:
    loss = TASKS["cross_entropy"].loss
    never_waits("cross_entropy", *door("LossHook", loss, curvature="hessian", structure=structure))


def waits_of(step: Callable[[], None]) -> int:
    """How often the host waits in a step."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return sum(WAITS in str(w.message) for w in caught)


def by_products(y: Tensor, t: Tensor) -> Tensor:
    return torch.cosh(y - t.unsqueeze(-1)).mean()


@pytest.mark.parametrize("damping", ["auto", 0.1])
@pytest.mark.parametrize("structure", ["mean", "per_sample"])
@pytest.mark.parametrize("loss", [by_products, TASKS["cross_entropy"].loss], ids=["products", "closed form"])
def test_a_hessian_looks_once_a_step(loss: Loss, structure: str, damping: Any) -> None:
    """Whether Cholesky failed. That samples are independent and no hook is in the way is verified at the first step."""
    step = steps("cross_entropy", door("LossHook", loss, curvature="hessian", structure=structure, damping=damping)[0])
    counts = [waits_of(step) for _ in range(4)]
    assert counts[0] >= counts[1]
    assert counts[1:] == [1, 1, 1]


def test_raising_looks_at_every_step() -> None:
    step = steps("cross_entropy", door("LossHook", TASKS["cross_entropy"].loss, on_nonfinite="raise")[0])
    assert all(waits_of(step) >= 1 for _ in range(3))


def test_a_zero_hessian_is_reported_when_somebody_asks() -> None:
    hook = npl.LossHook(curvature="hessian", damping=0.1)
    step = steps("curved", lambda y, t: hook((y - t).abs().sum(-1).mean()))
    step()  # without the warning, which would be an error here
    with pytest.warns(UserWarning, match="in place of Hessian.*the Hessian is zero"):
        assert hook.diagnostics()["fallbacks"] == 1
