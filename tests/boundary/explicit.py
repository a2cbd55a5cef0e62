"""A loss whose outputs are known, and the step that is taken explicitly at them: what the hook is held against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import newton_plugin as npl

DAMPING = 0.1


class Case(NamedTuple):
    """A loss and the one tensor at which it is to be stepped.

    Attributes:
        loss: what the hook gets.
        outputs: where the step is right.
        of_outputs: the loss as a function of the outputs alone; what lies beside them is left out.
        network: gets the step.
        beside: the loss's terms that do not pass the outputs; None: there are none.
        features: which dimensions of the outputs are features.
    """

    loss: Tensor
    outputs: Tensor
    of_outputs: Callable[[Tensor], Tensor]
    network: Sequence[Tensor]
    beside: Tensor | None = None
    features: tuple[int, ...] | None = None


def linear(rows: int = 5, columns: int = 3, bias: bool = True, seed: int = 0) -> nn.Linear:
    """A layer in float64, the same at every call."""
    torch.manual_seed(rows + 10 * columns + 1000 * seed)
    return nn.Linear(rows, columns, bias=bias).double()


def of(*modules: nn.Module) -> list[Tensor]:
    """Their parameters."""
    return [parameter for module in modules for parameter in module.parameters()]


def check(case: Case, **options: object) -> None:
    """The hook gives the network what the explicit step gives, and the terms beside it their plain gradient."""
    y = case.outputs.detach()
    step = npl.newton_step(case.of_outputs, y, damping=DAMPING, feature_dims=case.features).step
    rows = y.numel() // (torch.Size(y.shape[d] for d in case.features or range(1, y.ndim)).numel())
    wanted = torch.autograd.grad(case.outputs, case.network, step / rows, retain_graph=True, allow_unused=True)
    plain = [None] * len(wanted)
    if case.beside is not None:
        plain = torch.autograd.grad(case.beside, case.network, retain_graph=True, allow_unused=True)
    hook = npl.LossHook(damping=DAMPING, **options)  # type: ignore[arg-type]
    got = torch.autograd.grad(hook(case.loss), case.network)
    for ours, *parts in zip(got, wanted, plain, strict=True):
        expected = sum(part for part in parts if part is not None)
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)
