"""Modules to fit, short fits, and the surrogate's gradients written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tests.cases import CLASSES, FEATURES, Case
from tests.twins import gradients_and_hessians, in_one_size, step
from torch import Tensor, nn

import newton_plugin as npl

Batch = tuple[Tensor, Tensor]
DAMPING = 0.05


class Batches:
    """A loader: Lightning takes any iterable that is not a list."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def trainer(pl: Any, *callbacks: Any, **options: Any) -> Any:
    """A Trainer on the CPU that writes nothing."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def plain_module(pl: Any, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], **attributes: Any) -> Any:
    """A LightningModule around ``model``, SGD with rate 1: a step moves parameters by minus their gradient.

    ``attributes`` are methods and values set on the class before it is made.
    """

    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.losses: list[float] = []

        def forward(self, x: Tensor) -> Any:
            return self.model(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            value = loss(self.model, batch)
            self.losses.append(value.item())
            self.log("loss", value, batch_size=1)
            return value

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    return type("Module", (Plain,), attributes)()


def case_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a module of ``tests.cases``."""
    assert isinstance(model, Case)
    return model.loss(model(batch[0]), batch[1])


def case_module(pl: Any, make: type[Case], **attributes: Any) -> Any:
    """A case in float64, always with the same weights."""
    torch.manual_seed(0)
    return plain_module(pl, make().double(), case_loss, **attributes)


def batches_of(make: type[Case], count: int) -> list[Batch]:
    """``count`` batches, the same every time."""
    generator, case = torch.Generator().manual_seed(1), make()
    return [case.batch(generator) for _ in range(count)]


def parameters(module: nn.Module) -> list[Tensor]:
    """A copy of all parameters."""
    return [p.detach().clone() for p in module.parameters()]


def moved(before: list[Tensor], module: nn.Module) -> list[Tensor]:
    """How far a fit has moved the parameters, minus the learning rate (1) times the gradients."""
    return [b - p.detach() for b, p in zip(before, module.parameters(), strict=True)]


def surrogate_gradients(
    model: Case, batches: Sequence[Batch], curvature: str, structure: str = "mean", power: float = 1
) -> list[Tensor]:
    """Gradients of the mean over ``batches`` of the surrogate, written out.

    Forward; step of every boundary by the dense twin; ``1/2 |y - target|^2``, mean over the samples; backward.
    """
    named = list(model.parameters())
    total = torch.zeros((), dtype=torch.float64)
    for x, t in batches:
        output = model(x)
        gradients, all_rows = [], []
        for which, y in enumerate(model.boundaries(output)):

            def loss_of(rows: Tensor, which: int = which, y: Tensor = y, output: Any = output, t: Tensor = t) -> Tensor:
                return model.loss(model.with_boundary(output, which, model.unrows(rows, y)), t)

            rows = model.rows(y)
            g, h = gradients_and_hessians(loss_of, rows)
            gradients.append((g, h))
            all_rows.append(rows)
        calls = len(all_rows) if model.one_layer else 1
        if model.one_layer:  # one batch, whose mean is over the rows of all calls
            g, h = (torch.cat([calls * pair[k] for pair in gradients]) for k in (0, 1))
            steps = list(step(g, h, curvature, structure, power, DAMPING).chunk(calls))
        else:
            steps = [step(g, h, curvature, structure, power, DAMPING) for g, h in gradients]
        size = 1.0
        if curvature == "norm" and not model.one_layer:  # a relative damping: the loss has one size
            steps, size = in_one_size([g for g, _ in gradients], steps, 0.5)
        total = total + size * model.plain(output)
        for rows, taken in zip(all_rows, steps, strict=True):
            total = total + npl.quadratic_surrogate(rows, rows.detach() - taken.reshape(rows.shape)) / calls
    named = [p for p in named if p.requires_grad]
    grads = torch.autograd.grad(total / len(batches), named, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(named, grads, strict=True)]


class Classifier(nn.Module):
    """Encoder, head, criterion: names for ``boundary``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh())
        self.head = nn.Linear(5, CLASSES)
        self.criterion = nn.CrossEntropyLoss()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def classifier_module(pl: Any, functional: bool = False, **attributes: Any) -> Any:
    """A :class:`Classifier` in float64; its loss through ``criterion`` or through ``F.cross_entropy``."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        criterion = F.cross_entropy if functional else model.criterion
        return criterion(model(batch[0]), batch[1])

    torch.manual_seed(0)
    return plain_module(pl, Classifier().double(), loss, **attributes)
