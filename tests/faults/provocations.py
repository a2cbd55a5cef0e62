"""Models, batches and losses, each with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tests.faults.doors import Batch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEATURES, CLASSES = 4, 3
_G = torch.Generator().manual_seed(0)


class Net(nn.Module):
    """An encoder, a head, and a spare layer that nobody calls.

    No biases, so that a zero input has zero outputs; a positive head, so that an infinite one has infinite outputs.
    """

    def __init__(self, outputs: int = CLASSES) -> None:
        super().__init__()
        self.encoder = nn.Linear(FEATURES, 5, bias=False)
        self.head = nn.Linear(5, outputs, bias=False)
        self.spare = nn.Linear(2, 2)
        nn.init.uniform_(self.head.weight, 0.1, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.encoder(x)))


class Sometimes(Net):
    """Leaves its head out for batches marked by a large number."""

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)[:, :CLASSES] if float(x.max()) > 100 else super().forward(x)


class Beside(Net):
    """Calls its head and returns something else."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return self.encoder(x)[:, :CLASSES]


class Weights(Net):
    """Returns a number made of parameters alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head.weight.sum() + self.encoder.weight.square().sum()


class Watched(Net):
    """A user's own hook on the outputs, which takes notes and multiplies the gradient by ``factor``."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)

        def note(gradient: Tensor) -> Tensor:
            self.seen.append(gradient.clone())
            return self.factor * gradient

        y.register_hook(note)
        return y


class HookedHead(Net):
    """The same by a hook on the layer, before its own backward."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

        def note(module: nn.Module, gradients: Any) -> tuple[Tensor]:
            self.seen.append(gradients[0].clone())
            return (factor * gradients[0],)

        self.head.register_full_backward_pre_hook(note)


class Retained(Net):
    """Keeps its outputs, and their gradient."""

    def forward(self, x: Tensor) -> Tensor:
        self.outputs = super().forward(x)
        self.outputs.retain_grad()
        return self.outputs


class Frozen(Net):
    """Nothing to train."""

    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)


def batch(n: int = 6) -> Batch:
    """Inputs and real targets."""
    x = torch.randn(n, FEATURES, generator=_G, dtype=torch.float64)
    return x, torch.rand(n, CLASSES, generator=_G, dtype=torch.float64)


GOOD, LATER = batch(), batch()


def made(model: Callable[[], nn.Module]) -> nn.Module:
    """A model in float64, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model().double()


def awake() -> Batch:
    """Inputs with positive outputs: no gradient is zero or infinite but where it is meant to be."""
    x, t = batch(40)
    positive = made(Net)(x).min(-1).values > 0.05
    return x[positive][:6], t[positive][:6]


AWAKE = awake()


def spoiled(value: float) -> Batch:
    """A batch with one bad number in its inputs, and so in its outputs."""
    x, t = batch()
    x[2, 1] = value
    return x, t


def with_zero_outputs() -> Batch:
    """One sample's outputs are exactly zero."""
    x, t = (part.clone() for part in AWAKE)
    x[2] = 0
    return x, t


class OnlyOnce(torch.autograd.Function):
    """Softplus whose backward is marked as differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.softplus(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.sigmoid(ctx.saved_tensors[0])


def bce(y: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(y, t)


def square(y: Tensor, t: Tensor) -> Tensor:
    return (y - t).square().sum(-1).mean()


def quartic(y: Tensor, t: Tensor) -> Tensor:
    return (0.1 * (y - t) ** 4 + (y - t).square()).sum(-1).mean()


def of_the_sum(y: Tensor, t: Tensor) -> Tensor:
    return (y.sum(-1) - t.sum(-1)).square().mean()


def coupled(y: Tensor, t: Tensor) -> Tensor:
    return F.cross_entropy(y @ y.T, torch.arange(len(y)))


def detached(y: Tensor, t: Tensor) -> Tensor:
    return square(y.detach(), t)
