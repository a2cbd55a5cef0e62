"""Small networks with losses and batches: where outputs meet the loss in every way that the package knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks.versions.losses import CLASSES, FIELDS, LOSSES, VALUES, Loss
from torch import Tensor, nn

__all__ = ["PROBLEMS", "Problem"]

_INPUTS, _HIDDEN, _STEPS = 4, 3, 5
_SPOILED = 77.0  # a target that marks a sample whose gradient is to be spoiled


@dataclass
class Problem:
    """A network, a loss and batches.

    Attributes:
        model: inputs to outputs: a tensor or a tuple of tensors.
        loss: ``loss(*outputs, target)``.
        batches: inputs and target of each step.
        hook: arguments that LossHook needs here.
        wrap: arguments that newton_loss needs here.
        every: arguments that all doors need here.
        factor: what the loss is multiplied by after the hook.
        passes: backward passes through one loss.
        names: the name of the loss in each step, for losses that end at one layer.
        autocast: whether the network runs under autocast.
        diagnosed: whether diagnostics are read after each step; their eigenvalues cost much of large outputs.
        watched: whether the outputs keep their gradients, as tensors that are not leaves.
    """

    model: nn.Module
    loss: Loss
    batches: list[tuple[Tensor, Tensor]]
    hook: dict[str, Any] = field(default_factory=dict)
    wrap: dict[str, Any] = field(default_factory=dict)
    every: dict[str, Any] = field(default_factory=dict)
    factor: float = 1.0
    passes: int = 1
    names: tuple[str, ...] = ("",)
    autocast: bool = False
    diagnosed: bool = True
    watched: bool = False


class Head(nn.Module):
    """Linear, with an offset for each entry of the outputs: its gradient is what enters the network there."""

    def __init__(self, shape: tuple[int, ...], samples: int) -> None:
        super().__init__()
        features = int(torch.Size(shape).numel())
        self.shape = shape
        self.weight = nn.Parameter(torch.randn(_HIDDEN, features) / 2)
        self.offset = nn.Parameter(torch.randn(samples, *shape) / 2)

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden @ self.weight).reshape(len(hidden), *self.shape) + self.offset[: len(hidden)]


class Network(nn.Module):
    """Inputs (N, 4) to outputs (N, *shape)."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.Linear(_INPUTS, _HIDDEN)
        self.head = head

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.tanh(self.trunk(x)))


class TwoHeads(Network):
    """Two outputs of different widths."""

    def __init__(self, samples: int) -> None:
        super().__init__(Head((3,), samples))
        self.second = Head((2,), samples)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.trunk(x))
        return self.head(hidden), self.second(hidden)


class Hidden(Network):
    """Outputs, and the hidden layer behind them."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x)
        return self.head(torch.tanh(hidden)), hidden


class Twice(Network):
    """One layer that is called twice."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), super().forward(-x)


class WithCriterion(Network):
    """The loss is a submodule, ``criterion``, called by a method, ``training_loss``."""

    def __init__(self, head: nn.Module, reduction: str) -> None:
        super().__init__(head)
        self.criterion = nn.CrossEntropyLoss(reduction=reduction)

    def training_loss(self, y: Tensor, target: Tensor) -> Tensor:
        return self.criterion(y, target)


def _batches(n: int, shape: tuple[int, ...], loss: str, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Five batches; float64 decides the numbers whatever the dtype."""
    made = []
    for k in range(_STEPS):
        x = torch.randn(n, _INPUTS, dtype=torch.float64)
        if loss in CLASSES:
            target = torch.randint(0, max(1, shape[0]), (n, *shape[1:]))
        elif loss == "ranking":
            target = torch.rand(n, *shape).argsort(-1)
        elif loss == "binary":
            target = torch.rand(n, *shape, dtype=torch.float64).to(dtype)
        else:
            target = torch.randn(n, *shape, dtype=torch.float64).to(dtype)
        made.append(((x * (1 + k / 2)).to(dtype), target))
    return made


def plain_outputs(
    loss: str, n: int, shape: tuple[int, ...], dtype: torch.dtype, reduction: str, **more: Any
) -> Problem:
    """Outputs (n, *shape) under one of the losses."""
    batches = _batches(n, shape, loss, dtype)
    return Problem(Network(Head(shape, n)), partial(LOSSES[loss], reduction=reduction), batches, **more)


def linear_head(dtype: torch.dtype, reduction: str) -> Problem:
    """Outputs of an nn.Linear."""
    problem = plain_outputs("cross_entropy", 6, (3,), dtype, reduction)
    problem.model = Network(nn.Linear(_HIDDEN, 3))
    return problem


def sequence(
    dtype: torch.dtype, reduction: str, loss: str = "cross_entropy", more: dict[str, Any] | None = None
) -> Problem:
    """Outputs (N, T, V), whose cross-entropy is of (N, V, T)."""
    n, t, v = 4, 3, 4
    made = LOSSES[loss]
    x = [b[0] for b in _batches(n, (v, t), "mse", dtype)]
    y = [torch.randint(0, v, (n, t)) if loss in CLASSES else torch.rand(n, t, v).to(dtype) for _ in x]

    def of_sequence(outputs: Tensor, target: Tensor) -> Tensor:
        if loss in CLASSES:
            return made(outputs.flatten(0, 1), target.flatten(), reduction=reduction)
        return made(outputs, target, reduction=reduction)

    given = {"feature_dims": -1} if more is None else more
    return Problem(Network(Head((t, v), n)), of_sequence, list(zip(x, y, strict=True)), every=given)


def transposed(dtype: torch.dtype, reduction: str) -> Problem:
    """Outputs (N, T, V) that the loss transposes, with feature_dims: LossHook warns."""
    problem = sequence(dtype, reduction, more={"feature_dims": 1})
    problem.loss = lambda y, target: F.cross_entropy(y.mT, target, reduction=reduction)
    return problem


def named(boundary: str | list[str], dtype: torch.dtype, reduction: str) -> Problem:
    """The boundary by name: a submodule, a loss that is one, a method, a function of torch.nn.functional."""
    problem = plain_outputs("cross_entropy", 6, (3,), dtype, reduction)
    model = WithCriterion(Head((3,), 6), reduction)
    # Looked up at every call: LossHook.watch() puts a method of its own in its place.
    problem.model, problem.loss = model, lambda y, target: model.training_loss(y, target)
    problem.hook = {"boundary": boundary}
    return problem


def two_heads(dtype: torch.dtype, reduction: str, **hook: Any) -> Problem:
    """Two outputs with a loss each."""
    problem = plain_outputs("cross_entropy", 6, (3,), dtype, reduction, hook=hook, wrap={"outputs": (0, 1)})
    problem.model = TwoHeads(6)

    def loss(first: Tensor, second: Tensor, target: Tensor) -> Tensor:
        each = torch.log1p(second.square()).sum(-1)
        more = each.mean() if reduction == "mean" else each.sum()
        return F.cross_entropy(first, target, reduction=reduction) + 0.5 * more

    problem.loss = loss
    return problem


def nested(dtype: torch.dtype, reduction: str) -> Problem:
    """A penalty on a hidden layer: of nested boundaries the one nearest the loss counts."""
    problem = plain_outputs("cross_entropy", 6, (3,), dtype, reduction)
    problem.model = Hidden(Head((3,), 6))
    problem.loss = lambda y, hidden, t: F.cross_entropy(y, t, reduction=reduction) + 0.3 * hidden.square().mean()
    return problem


def twice(dtype: torch.dtype, reduction: str) -> Problem:
    """A layer that is called twice in one loss."""
    problem = plain_outputs("mse", 6, (3,), dtype, reduction, wrap={"outputs": [0, 1]})
    problem.model = Twice(Head((3,), 6))
    problem.loss = lambda a, b, target: F.mse_loss(a + b * b.detach(), target, reduction=reduction)
    return problem


def penalised(dtype: torch.dtype, reduction: str) -> Problem:
    """Weight decay written into the loss: its gradient stays as it is."""
    problem = plain_outputs("indefinite", 7, (4,), dtype, reduction)
    model, loss = problem.model, problem.loss
    problem.loss = lambda y, t: loss(y, t) + 0.2 * sum(p.square().sum() for p in model.parameters())
    return problem


def changing(kind: str, dtype: torch.dtype, reduction: str) -> Problem:
    """Batches of different sizes, or outputs of different widths."""
    problem = plain_outputs("huber", 6, (5,), dtype, reduction)
    sizes = [6, 4, 6, 1, 3]
    if kind == "samples":
        problem.batches = [(x[:n], t[:n]) for (x, t), n in zip(problem.batches, sizes, strict=True)]
    else:
        problem.batches = [(x, t[:, : n - 1]) for (x, t), n in zip(problem.batches, [6, 6, 4, 4, 6], strict=True)]
        problem.loss = lambda y, t: F.huber_loss(y[:, : t.shape[1]] * 1.0, t, reduction=reduction)
    return problem


def spoiled(kind: str, dtype: torch.dtype, reduction: str, **more: Any) -> Problem:
    """Gradients that are "nan", "inf" or "zero" at the second and the fourth step; the loss stays finite."""
    problem = plain_outputs("indefinite", 6, (3,), dtype, reduction, every=more)
    loss = problem.loss

    def spoiling(y: Tensor, target: Tensor) -> Tensor:
        bad = target[:, :1] == _SPOILED
        if kind == "zero":
            return loss(torch.where(bad, y.detach(), y), target)
        # The square root has an infinite slope at 0.
        root = torch.where(bad, 0 * y if kind == "nan" else y - y.detach(), 1 + 0 * y).sqrt()
        return loss(y, target) + root.mean()

    problem.loss = spoiling
    rows = slice(None) if kind == "zero" else slice(1)
    for k in (1, 3):
        problem.batches[k][1][rows, 0] = _SPOILED
    return problem


def exploding(dtype: torch.dtype, reduction: str) -> Problem:
    """A batch with gradients of 1e6 among small ones."""
    problem = plain_outputs("mse", 6, (3,), dtype, reduction)
    problem.batches[1][1][2] = 3e4
    return problem


def solved(dtype: torch.dtype, reduction: str) -> Problem:
    """Every gradient is exactly zero, from the first step on."""
    problem = plain_outputs("mse", 5, (3,), dtype, reduction)
    problem.loss = lambda y, t: F.mse_loss(y, y.detach().clone(), reduction=reduction)
    return problem


def autocast(dtype: torch.dtype, reduction: str) -> Problem:
    """The forward pass under bfloat16 autocast."""
    return plain_outputs("cross_entropy", 6, (3,), torch.float32, reduction, autocast=True)


def unreduced(loss: str, dtype: torch.dtype, reduction: str) -> Problem:
    """One loss for each sample, reduced after the wrapped loss function."""
    return plain_outputs(loss, 6, (4,), dtype, "none")


def strided(dtype: torch.dtype, reduction: str) -> Problem:
    """Outputs that are not contiguous in memory."""
    problem = plain_outputs("indefinite", 6, (4,), dtype, reduction)
    loss = problem.loss
    problem.loss = lambda y, t: loss(y.mT.contiguous().mT, t)
    return problem


def one_dimension(dtype: torch.dtype, reduction: str) -> Problem:
    """Outputs (N,)."""
    return plain_outputs("binary", 6, (), dtype, reduction)


Build = Callable[[torch.dtype, str], Problem]


def _problems() -> dict[str, Build]:
    made: dict[str, Build] = {
        "linear_head": linear_head,
        "sequence": sequence,
        "sequence_mse": partial(sequence, loss="mse"),
        "sequence_all_features": partial(sequence, more={}),
        "sequence_two_feature_dims": partial(sequence, more={"feature_dims": (1, 2)}),
        "transposed": transposed,
        "submodule": partial(named, "head"),
        "named_loss": partial(named, "criterion"),
        "named_method": partial(named, "training_loss"),
        "named_function": partial(named, "cross_entropy"),
        "wrong_name": partial(named, "haed"),
        "two_heads": two_heads,
        "two_names": partial(two_heads, boundary=["head", "second"]),
        "nested": nested,
        "twice": twice,
        "penalised": penalised,
        "changing_samples": partial(changing, "samples"),
        "changing_width": partial(changing, "width"),
        "nan": partial(spoiled, "nan"),
        "inf": partial(spoiled, "inf"),
        "zero_batches": partial(spoiled, "zero"),
        "nan_raises": partial(spoiled, "nan", on_nonfinite="raise"),
        "exploding": exploding,
        "solved": solved,
        "autocast": autocast,
        "strided": strided,
        "one_dimension": one_dimension,
        "scaled": lambda dtype, r: plain_outputs("cross_entropy", 6, (3,), dtype, r, factor=1024.0),
        "two_passes": lambda dtype, r: plain_outputs("cross_entropy", 6, (3,), dtype, r, passes=2),
        "watched": lambda dtype, r: plain_outputs("huber", 6, (3,), dtype, r, watched=True),
        "named_losses": lambda dtype, r: plain_outputs("indefinite", 6, (3,), dtype, r, names=("real", "fake")),
        "one_sample": lambda dtype, r: plain_outputs("indefinite", 1, (3,), dtype, r),
        "one_feature": lambda dtype, r: plain_outputs("huber", 6, (1,), dtype, r),
        "empty": lambda dtype, r: plain_outputs("mse", 0, (3,), dtype, r),
        "no_features": lambda dtype, r: plain_outputs("mse", 3, (0,), dtype, r),
    }
    for loss in CLASSES:
        made[f"{loss}_12x5"] = partial(plain_outputs, loss, 12, (5,))
    for loss in VALUES:
        made[f"{loss}_9x4"] = partial(plain_outputs, loss, 9, (4,))
    for loss in ("cross_entropy", "indefinite", "known_products"):
        made[f"{loss}_4x9"] = partial(plain_outputs, loss, 4, (9,))
    for loss in ("cross_entropy", "weighted", "mse", "indefinite", "known_blocks", "known_products", "ranking"):
        made[f"{loss}_6x20"] = partial(plain_outputs, loss, 6, (20,))
    for loss in FIELDS:
        for dims in (1, None):
            name = f"{loss}_image" + ("" if dims else "_all_features")
            made[name] = partial(plain_outputs, loss, 2, (3, 2, 2), every={"feature_dims": dims})
    for loss in ("cross_entropy", "huber"):
        made[f"unreduced_{loss}"] = partial(unreduced, loss if loss == "cross_entropy" else "piecewise")
    made["unreduced_known_blocks"] = partial(unreduced, "known_blocks")
    return made


def _large() -> dict[str, Build]:
    """Beyond the sizes at which the package takes other ways: 128, 256 and 1024 features, 2**19 elements."""
    made: dict[str, Build] = {}
    for loss in ("cross_entropy", "indefinite", "known_products", "known_blocks"):
        made[f"{loss}_5x140"] = partial(plain_outputs, loss, 5, (140,))
        made[f"{loss}_5x260"] = partial(plain_outputs, loss, 5, (260,))
        made[f"{loss}_3x1030"] = partial(plain_outputs, loss, 3, (1030,), diagnosed=False)
    made["cross_entropy_270x260"] = partial(plain_outputs, "cross_entropy", 270, (260,), diagnosed=False)
    made["indefinite_150x140"] = partial(plain_outputs, "indefinite", 150, (140,), diagnosed=False)
    return made


def _huge() -> dict[str, Build]:
    """More than 2**19 elements: rows are taken in parts."""
    return {
        f"{loss}_64x8200": partial(plain_outputs, loss, 64, (8200,), diagnosed=False)
        for loss in ("cross_entropy", "mse", "indefinite")
    } | {"mse_70000x8": partial(plain_outputs, "mse", 70000, (8,), diagnosed=False)}


# By cost: a step takes a millisecond, some tens, a hundred and more.
PROBLEMS: dict[str, dict[str, Build]] = {"small": _problems(), "large": _large(), "huge": _huge()}
