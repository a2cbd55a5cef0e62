"""Nineteen losses as people write them; each does something that can break a differentiation tool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from newton_plugin.algorithms import RankingLoss

N, M = 6, 4
_G = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_G, dtype=torch.float64)


Y = _normal(N, M)
REAL = _normal(N, M)
SIGNS = torch.where(_normal(N, M) > 0, 1.0, -1.0).double()
CLASS = torch.tensor([0, 1, 2, 3, 0, 2])
IGNORING = torch.tensor([0, 1, -100, 3, 0, 2])
RANKS = torch.rand(N, M, generator=_G).argsort(-1)
PROTOTYPES = _normal(M, M)
WEIGHTS = torch.tensor([1.0, 0.2, 3.0, 0.5], dtype=torch.float64)
FRAMES = _normal(N, 5, M)  # (N, T, classes)
LABELS = torch.tensor([[1, 2], [2, 3], [3, 1], [1, 1], [2, 2], [1, 3]])


def in_place(y: Tensor, t: Tensor) -> Tensor:
    """Works in place on the outputs and writes its results into a buffer."""
    y.mul_(2).sub_(t)
    losses = torch.zeros(len(y), dtype=y.dtype)
    for k in range(y.shape[1]):
        losses[:] += torch.cosh(y[:, k])
    return losses.mean()


def branch(y: Tensor, t: Tensor) -> Tensor:
    """An ``if`` on the outputs: the robust loss far from the target."""
    error = y - t
    if error.abs().max() > 100:
        return error.abs().sum(-1).mean()
    return torch.log(torch.cosh(error)).sum(-1).mean()


def item(y: Tensor, t: Tensor) -> Tensor:
    """A scale read out as a Python number (of the targets, so that it is a constant)."""
    scale = t.abs().max().item()
    return ((y - t) / scale).pow(4).sum(-1).mean()


def noisy(y: Tensor, t: Tensor) -> Tensor:
    """Fresh noise on the outputs, as in noise-contrastive and smoothed losses."""
    return torch.sin(y + 0.3 * torch.randn(y.shape).to(y) - t).square().sum(-1).mean()


def dropped(y: Tensor, t: Tensor) -> Tensor:
    """Dropout between the outputs and the loss."""
    return F.binary_cross_entropy_with_logits(F.dropout(y, 0.3), torch.sigmoid(t))


class Normalised(nn.Module):
    """BatchNorm, in training mode, between the outputs and the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(M, affine=False)

    def forward(self, y: Tensor, t: Tensor) -> Tensor:
        return (self.norm(y) - t).pow(4).sum(-1).mean()


class OldStyleCube(torch.autograd.Function):
    """``x^3`` with the context in ``forward`` and a backward of differentiable operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class NewStyleCube(torch.autograd.Function):
    """The same with ``setup_context`` and a generated vmap rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class NumpyCosh(torch.autograd.Function):
    """``cosh`` computed in numpy, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.cosh(x.detach().numpy()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.from_numpy(np.sinh(x.detach().numpy()))


def info_nce(y: Tensor) -> Tensor:
    """Each sample's negatives are the other samples of the batch."""
    return F.cross_entropy(y @ y.T, torch.arange(len(y)))


def ctc(y: Tensor, labels: Tensor) -> Tensor:
    """Connectionist temporal classification, outputs batch first."""
    log_p = y.log_softmax(-1).transpose(0, 1)
    frames, length = [y.shape[1]] * len(y), [labels.shape[1]] * len(y)
    return F.ctc_loss(log_p, labels, frames, length, reduction="sum") / len(y)


def cosine(y: Tensor, t: Tensor) -> Tensor:
    """Pull towards half of the targets, push away from the others."""
    return F.cosine_embedding_loss(y, t, torch.tensor([1, -1, 1, -1, 1, -1][: len(y)]), margin=-0.9)


@dataclass(frozen=True)
class Row:
    """A loss at outputs, and what is to be found: derived from what the loss is, see the comment beside each.

    Attributes:
        hessian: "exact", "zero" (it has none to give), "missing" (there is one; autograd cannot give it).
        random: draws from torch's generator.
        coupled: a sample's gradient depends on other samples' outputs.
        definite: "definite", "indefinite", or "" where there is nothing to say.
        curvature: "hessian" where it is available, else "fisher".
        vmap: whether ``vmap`` over the samples can follow the loss.
    """

    loss: Callable[..., Tensor]
    args: tuple[Any, ...]
    hessian: str = "exact"
    random: bool = False
    coupled: bool = False
    definite: str = "definite"
    curvature: str = "hessian"
    vmap: bool = True
    outputs: Tensor = field(default_factory=lambda: Y)


LOSSES: dict[str, Row] = {
    "in-place": Row(in_place, (REAL,), vmap=False),  # writes batched values into an unbatched buffer
    "branch": Row(branch, (REAL,), vmap=False),  # log cosh is strictly convex
    "item": Row(item, (REAL,), vmap=False),  # the 4th power is strictly convex
    "randn": Row(noisy, (REAL,), random=True, definite="indefinite", vmap=False),  # sin^2 is periodic
    # A dropped output has no second derivative, so semidefinite.
    "dropout": Row(dropped, (REAL,), random=True, definite="semidefinite", vmap=False),
    "BatchNorm": Row(Normalised().double(), (REAL,), coupled=True, definite="", curvature="fisher", vmap=False),
    # sum of x^3: 6 x, of either sign.
    "autograd.Function, ctx in forward": Row(
        lambda y: OldStyleCube.apply(y).sum(-1).mean(), (), definite="indefinite", vmap=False
    ),
    "autograd.Function, setup_context": Row(lambda y: NewStyleCube.apply(y).sum(-1).mean(), (), definite="indefinite"),
    # The backward's numbers come from numpy: a constant for autograd, so the second derivative is silently lost.
    "numpy": Row(
        lambda y: NumpyCosh.apply(y).sum(-1).mean(), (), "missing", definite="", curvature="fisher", vmap=False
    ),
    # Squared distances would be quadratic; torch has no second derivative of cdist.
    "cdist": Row(
        lambda y: torch.cdist(y, PROTOTYPES.to(y)).square().sum(-1).mean(),
        (),
        "missing",
        definite="",
        curvature="fisher",
        vmap=False,
    ),
    "mse": Row(F.mse_loss, (REAL,)),
    # Quadratic near, linear far: some samples have linear coordinates, with zero curvature.
    "huber": Row(F.huber_loss, (REAL,), definite="semidefinite"),
    "soft_margin": Row(F.soft_margin_loss, (SIGNS,)),
    # Hinge: piecewise linear.
    "multi_margin": Row(F.multi_margin_loss, (CLASS,), "zero", definite="", curvature="fisher", vmap=False),
    # Adding a constant to all logits of a sample changes nothing: one zero eigenvalue.
    "cross_entropy, weight and ignore_index": Row(
        lambda y, t: F.cross_entropy(y, t, weight=WEIGHTS.to(y)), (IGNORING,), definite="semidefinite"
    ),
    "InfoNCE": Row(info_nce, (), coupled=True, definite="", curvature="fisher"),
    "CTC": Row(ctc, (LABELS,), "missing", definite="", curvature="fisher", vmap=False, outputs=FRAMES),
    # Along y itself the cosine is constant, and it bends both ways across.
    "cosine embedding": Row(cosine, (REAL,), definite="indefinite"),
    "NeuralSort": Row(RankingLoss("neural_sort", temperature=0.5), (RANKS,), definite="indefinite"),
}
