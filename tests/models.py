"""Models as people write them, each with the boundary that should be found. See :mod:`tests.cases`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tests.cases import CLASSES, FEATURES, Case, IntermediateOutput, N, TwoHeads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TOKENS = 5


def tokens(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(N, TOKENS, FEATURES, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (N, TOKENS), generator=generator)


class Autoencoder(Case):
    """A VAE: the reconstruction is the outputs; the KL term reaches mean and variance beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_variance = nn.Linear(5, 2), nn.Linear(5, 2)
        self.decoder = nn.Linear(2, FEATURES)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.trunk(x))
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        noise = torch.sin(1e3 * x[:, :2])  # the same at every evaluation
        return self.decoder(mean + noise * (0.5 * log_variance).exp()), mean, log_variance

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return (output[0] - F.one_hot(target, FEATURES)).square().sum(-1).mean() + self.plain(output)

    def boundaries(self, output: Any) -> list[Tensor]:
        return [output[0]]

    def with_boundary(self, output: Any, which: int, y: Tensor) -> Any:
        return (y, *output[1:])

    def plain(self, output: Any) -> Tensor:
        _, mean, log_variance = output
        return 0.05 * (mean.square() + log_variance.exp() - log_variance).sum(-1).mean()


class AuxiliaryLoss(TwoHeads):
    """A second classifier on the trunk, with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(5, CLASSES)

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(output[0], target) + 0.3 * F.cross_entropy(output[1], target)


class SharedHead(TwoHeads):
    """One head on two views of the input: two calls of one layer, one curvature."""

    one_layer = True

    def forward(self, x: Tensor) -> Any:
        return tuple(self.head(torch.tanh(self.trunk(view))) for view in (x, x.flip(-1)))

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(output[0], target) + F.cross_entropy(output[1], target)


class TiedWeights(Case):
    """The embedding is the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 5)

    def forward(self, x: Tensor) -> Any:
        start = self.embedding(x.argmax(-1) % CLASSES)
        return torch.tanh(start + self.trunk(x)) @ self.embedding.weight.T


class FrozenBackbone(Case):
    def __init__(self) -> None:
        super().__init__()
        self.trunk.requires_grad_(False)


class Recurrent(Case):
    """An LSTM and a head on every hidden state."""

    feature_dims = -1

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(FEATURES, 5, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.recurrent(x)[0])

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(output.reshape(-1, CLASSES), target.reshape(-1))

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return tokens(generator)


class LanguageModel(Recurrent):
    """Attention, and logits (N, T, V): a row for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(FEATURES, 2, batch_first=True)
        self.vocabulary = nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.vocabulary(x + self.attention(x, x, x, need_weights=False)[0])


class Segmentation(Case):
    """(N, C, H, W) with a loss for each pixel."""

    feature_dims = 1

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, CLASSES, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        return self.convolution(x)

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(N, 1, 4, 3, generator=generator, dtype=torch.float64)
        return x, torch.randint(0, CLASSES, (N, 4, 3), generator=generator)


class WholeImages(Segmentation):
    """The same with all pixels of an image as one sample's features: no ``feature_dims``."""

    feature_dims = None


class InPlaceAfterHead(Case):
    """Scaled and clamped in place: without parameters, so a part of the loss, whoever wrote it where."""

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return F.cross_entropy((output + 1).mul_(2).clamp_(-5, 5), target)


@dataclass
class Prediction:
    logits: Tensor
    scale: Tensor


class DataclassOutput(TwoHeads):
    def forward(self, x: Tensor) -> Any:
        return Prediction(*super().forward(x))

    def loss(self, output: Any, target: Tensor) -> Tensor:
        return super().loss((output.logits, output.scale), target)

    def boundaries(self, output: Any) -> list[Tensor]:
        return [output.logits, output.scale]

    def with_boundary(self, output: Any, which: int, y: Tensor) -> Any:
        return Prediction(*super().with_boundary((output.logits, output.scale), which, y))


class Regularised(IntermediateOutput):
    """L2 in the loss, an orthogonality penalty, and a penalty on activations behind the outputs: all plain."""

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.trunk(x))
        return self.head(hidden), hidden

    def plain(self, output: Any) -> Tensor:
        w = self.trunk.weight
        orthogonal = (w.T @ w - torch.eye(FEATURES, dtype=w.dtype)).square().sum()
        return 0.01 * orthogonal + 0.02 * self.head.weight.square().sum() + 0.1 * output[1].abs().mean()


class Checkpointed(Case):
    """Activations of trunk and head are computed again during backward."""

    def forward(self, x: Tensor) -> Any:
        hidden = checkpoint(self.trunk, x, use_reentrant=False)
        return checkpoint(self.head, torch.tanh(hidden), use_reentrant=False)


class MixtureDensity(Case):
    """One head whose parts mean different things: weights, means and widths of a mixture; far from convex."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(5, 6)

    def loss(self, output: Any, target: Tensor) -> Tensor:
        weights, means, widths = output.chunk(3, -1)
        deviation = (target[:, None].to(means) - means) * (-widths).exp()
        density = -0.5 * deviation.square() - widths - 0.5 * math.log(2 * math.pi)
        return -torch.logsumexp(F.log_softmax(weights, -1) + density, -1).mean()


MODELS: list[type[Case]] = [
    Autoencoder,
    AuxiliaryLoss,
    SharedHead,
    TiedWeights,
    FrozenBackbone,
    Recurrent,
    LanguageModel,
    Segmentation,
    WholeImages,
    InPlaceAfterHead,
    DataclassOutput,
    Regularised,
    Checkpointed,
    MixtureDensity,
]
