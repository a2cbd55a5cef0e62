"""The losses and modules that every curvature, structure and door has to pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newton_plugin.algorithms import RankingLoss

N, FEATURES, CLASSES = 6, 4, 3

CURVATURES = ["fisher", "hessian", "norm"]
STRUCTURES = ["mean", "per_sample", "isotropic"]


def curved(y: Tensor, t: Tensor) -> Tensor:
    """A non-convex loss with indefinite Hessians."""
    return (torch.sigmoid(3 * y) - t).square().sum(-1).mean() + 0.1 * torch.sin(y.prod(-1)).mean()


ranking = RankingLoss("neural_sort", temperature=0.5)


class Case(nn.Module):
    """A model, its loss, and what the boundary should turn out to be."""

    one_layer = False  # whether all boundaries are calls of one layer, whose rows are one batch
    feature_dims: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(FEATURES, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.trunk(x)))

    def loss(self, output: Any, target: Tensor) -> Tensor:
        """The loss of what ``forward`` returned."""
        return F.cross_entropy(output, target)

    def boundaries(self, output: Any) -> list[Tensor]:
        """The tensors in ``output`` where the step is taken."""
        return [output]

    def with_boundary(self, output: Any, which: int, y: Tensor) -> Any:
        """``output`` with one boundary replaced."""
        return y

    def plain(self, output: Any) -> Tensor:
        """The part of the loss that keeps its plain gradient."""
        return torch.zeros((), dtype=torch.float64)

    def rows(self, y: Tensor) -> Tensor:
        """A boundary with one sample's features in each row; :meth:`unrows` is the way back."""
        if self.feature_dims is None:
            return y
        return y.movedim(self.feature_dims, -1).flatten(0, -2)

    def unrows(self, rows: Tensor, like: Tensor) -> Tensor:
        if self.feature_dims is None:
            return rows.reshape(like.shape)
        moved = like.movedim(self.feature_dims, -1)
        return rows.reshape(moved.shape).movedim(-1, self.feature_dims)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        x = torch.randn(N, FEATURES, generator=generator, dtype=torch.float64)
        return x, torch.randint(0, CLASSES, (N,), generator=generator)


class Functional(Case):
    """The loss is a function called in training_step."""


class Criterion(Case):
    """The loss is a module, with class weights."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return self.criterion(output, target)


class InlineAlgorithm(Case):
    """A non-convex expression written into training_step."""

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return curved(output, F.one_hot(target, CLASSES).to(output))


class Ranking(Case):
    """Scores of the images of a list; the layers see (N n, features), the loss (N, n)."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x).squeeze(-1)

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return ranking(output, target)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(N, CLASSES, FEATURES, generator=generator, dtype=torch.float64)
        return x, torch.rand(N, CLASSES, generator=generator).argsort(-1)


class TwoHeads(Case):
    """Two outputs with a loss each, returned as a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.trunk(x))
        return self.head(hidden), self.second(hidden)

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(output[0], target) + 0.5 * torch.log1p(output[1].square()).sum(-1).mean()

    def boundaries(self, output: Any) -> list[Tensor]:
        return list(output)

    def with_boundary(self, output: Any, which: int, y: Tensor) -> Any:
        return tuple(y if k == which else o for k, o in enumerate(output))


class DictOutput(TwoHeads):
    """The same in a dictionary, one output nested."""

    def forward(self, x: Tensor) -> Any:
        first, second = super().forward(x)
        return {"logits": first, "more": [second]}

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return super().loss((output["logits"], output["more"][0]), target)

    def boundaries(self, output: Any) -> list[Tensor]:
        return [output["logits"], output["more"][0]]

    def with_boundary(self, output: Any, which: int, y: Tensor) -> Any:
        parts = [output["logits"], output["more"][0]]
        parts[which] = y
        return {"logits": parts[0], "more": [parts[1]]}


class IntermediateOutput(Case):
    """A penalty on a hidden layer, a term beside the outputs."""

    def forward(self, x: Tensor) -> Any:
        hidden = self.trunk(x)
        return self.head(torch.tanh(hidden)), hidden

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(output[0], target) + self.plain(output)

    def boundaries(self, output: Any) -> list[Tensor]:
        return [output[0]]

    def with_boundary(self, output: Any, which: int, y: Tensor) -> Any:
        return y, output[1]

    def plain(self, output: Any) -> Tensor:
        return 0.3 * output[1].square().mean()


class Penalised(Case):
    """Weight decay written into the loss: its gradient is not to be touched."""

    def plain(self, output: Any) -> Tensor:
        return 0.2 * sum((p.square().sum() for p in self.parameters()), torch.zeros(()))

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) + self.plain(output)


MODULES: list[type[Case]] = [
    Functional,
    Criterion,
    InlineAlgorithm,
    Ranking,
    TwoHeads,
    DictOutput,
    IntermediateOutput,
    Penalised,
]

LossCase = tuple[Callable[[Tensor, Tensor], Tensor], Callable[[torch.Generator], tuple[Tensor, Tensor]]]


def _classes(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(N, CLASSES, generator=g, dtype=torch.float64) * 2, torch.randint(0, CLASSES, (N,), generator=g)


def _real(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return tuple(torch.rand(N, CLASSES, generator=g, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


def _ranks(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(N, 4, generator=g, dtype=torch.float64), torch.rand(N, 4, generator=g).argsort(-1)


def _ignoring(g: torch.Generator) -> tuple[Tensor, Tensor]:
    y, t = _classes(g)
    return y, torch.where(torch.arange(N) == 1, -100, t)


def _soft(g: torch.Generator) -> tuple[Tensor, Tensor]:
    y, _ = _classes(g)
    return y, torch.softmax(torch.randn(N, CLASSES, generator=g, dtype=torch.float64), -1)


_W = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)

LOSSES: dict[str, LossCase] = {
    "mse": (F.mse_loss, _real),
    "huber": (F.huber_loss, _real),
    "bce": (F.binary_cross_entropy_with_logits, _real),
    "bce_weighted": (lambda y, t: F.binary_cross_entropy_with_logits(y, t, weight=_W, pos_weight=2 * _W), _real),
    "cross_entropy": (F.cross_entropy, _classes),
    "cross_entropy_weighted": (lambda y, t: F.cross_entropy(y, t, weight=_W, label_smoothing=0.2), _ignoring),
    "cross_entropy_soft": (lambda y, t: F.cross_entropy(y, t, weight=_W, label_smoothing=0.2), _soft),
    "non_convex": (curved, _real),
    "neural_sort": (ranking, _ranks),
}
