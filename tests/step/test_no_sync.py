"""The default step never waits for the device: no ``.item()``, no ``bool(tensor)``, no data-dependent shapes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import newton_plugin as npl

WAITS = ("_local_scalar_dense", "nonzero", "equal.default", "is_nonzero", "masked_select", "_assert_async")


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in WAITS):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("curvature", ["fisher", "norm"])
@pytest.mark.parametrize("structure", ["mean", "per_sample", "isotropic"])
@pytest.mark.parametrize("damping", ["auto", 0.1])
def test_a_training_step_does_not_wait(curvature: str, structure: str, damping: float | str) -> None:
    torch.manual_seed(0)
    model, x, t = nn.Linear(4, 3), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    options: dict[str, Any] = {"structure": "mean" if curvature == "norm" else structure, "damping": damping}
    hook = npl.LossHook(curvature=curvature, **options)
    wrapped = npl.newton_loss(F.cross_entropy, curvature=curvature, **options)
    with NoWaiting():
        for _ in range(2):
            hook(F.cross_entropy(model(x), t)).backward()
            wrapped(model(x), t).backward()
            hook._sharing.clear()  # after the first steps it is read whether others share the loss's operations
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        hook.diagnostics()


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.called.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_hessian_is_verified_once_and_not_at_every_step() -> None:
    """Whether the samples are coupled, and whether a hook changes the gradient: both make the host wait."""
    torch.manual_seed(0)
    model, x, t = nn.Linear(4, 3), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    hook, waits = npl.LossHook(curvature="hessian", damping=0.1), []
    for _ in range(3):
        with Recorder() as recorder:
            hook(torch.cosh(model(x) - t.unsqueeze(-1)).mean()).backward()
        hook._sharing.clear()
        waits.append(sum(any(name in op for name in WAITS) for op in recorder.called))
    assert waits[0] > waits[1] == waits[2]
    assert waits[1] <= 2  # did Cholesky fail; was the Hessian zero (looked at on the CPU alone)


def test_whether_others_share_the_operations_is_read_after_a_look_and_at_no_other_step() -> None:
    """Looks are at the steps 1 to 5, 8, 9, 16, 17, ..., so the steps after them wait once."""
    torch.manual_seed(0)
    model, x, t = nn.Linear(4, 3), torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    hook, waits = npl.LossHook(structure="isotropic"), []
    for step in range(1, 18):
        with Recorder() as recorder:
            hook(F.cross_entropy(model(x), t)).backward()
        if any(name in op for name in WAITS for op in recorder.called):
            waits.append(step)
    assert waits == [2, 3, 4, 5, 6, 9, 10, 17]
