"""How many operations a step adds to a plain one.

On an accelerator a small model's step is its launches and nothing else, so every operation here is time there. The
budgets are what the code takes now: to exceed one is to slow down every step, and should be meant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import newton_plugin as npl

# These make tensors of memory that is there, or take memory: nothing is launched.
FREE = {
    *("alias", "as_strided", "detach", "diagonal", "expand", "permute", "select", "slice", "squeeze", "t", "transpose"),
    *("unflatten", "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "empty", "empty_like", "new_empty"),
}

BUDGETS: list[tuple[dict[str, Any], int]] = [
    ({}, 34),
    ({"structure": "mean"}, 46),
    ({"structure": "mean", "damping": 0.1}, 26),
    ({"structure": "diagonal", "damping": 0.1}, 24),
    ({"structure": "isotropic", "damping": 0.1}, 24),
    ({"structure": "per_sample", "damping": 0.1}, 25),
    ({"curvature": "norm"}, 27),
    ({"curvature": "hessian", "damping": 0.1}, 48),
]
DOORS: dict[str, Callable[..., Callable[[Tensor, Tensor], Tensor]]] = {
    "LossHook": lambda **options: _hooked(npl.LossHook(**options)),
    "newton_loss": lambda **options: npl.newton_loss(F.cross_entropy, **options),
}


def _hooked(hook: npl.LossHook) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda y, t: hook(F.cross_entropy(y, t))


class Launches(TorchDispatchMode):
    """Counts the operations that would launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in FREE:
            self.called.append(name)
        return func(*args, **(kwargs or {}))


def launches(loss: Callable[[Tensor, Tensor], Tensor]) -> list[str]:
    """Of a step after the first six, in float32: at the seventh nobody looks for other users of the loss."""
    torch.manual_seed(0)
    model, x, t = nn.Linear(4, 10), torch.randn(128, 4), torch.randint(10, (128,))
    for _ in range(6):
        loss(model(x), t).backward()
    with Launches() as counted:
        loss(model(x), t).backward()
    return counted.called


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("options", "budget"), BUDGETS, ids=str)
def test_a_step_adds_no_more_operations_than_it_has_to(door: str, options: dict[str, Any], budget: int) -> None:
    taken = launches(DOORS[door](**options))
    added = len(taken) - len(launches(F.cross_entropy))
    assert 0 < added <= budget, (added, taken)


def test_views_are_not_counted_and_operations_are() -> None:
    x = torch.ones(2, 3)
    with Launches() as counted:
        x.t().unsqueeze(0).expand(4, 3, 2).select(0, 1).detach()
        _ = x.t().reshape(2, 3) + 1
    assert counted.called == ["clone", "add"]
