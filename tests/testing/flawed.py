"""Losses with a flaw, or with a property that an author should know, and the findings that are expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tests.testing.losses import NewStyleCube, NumpyCosh
from torch import Tensor

Y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor([0, 1, 2, 0, 1])
WEIGHT = torch.tensor([1.0, 2.0, 3.0])
CALLS = {"n": 0}


class Rounded(torch.autograd.Function):
    """A straight-through estimator: rounds in the forward pass, is the identity in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class DetachedCube(NewStyleCube):
    """Its backward works on a detached tensor."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x.detach() ** 2 * grad


def unrepeatable(y: Tensor) -> Tensor:
    CALLS["n"] += 1
    return (y * CALLS["n"]).square().sum(-1).mean()


def unstable(y: Tensor) -> Tensor:
    """log(1 - sigmoid) as the textbook writes it: wrong in float32 where 1 - p has one digit left."""
    return -torch.log(1 - torch.sigmoid(12 + y.abs() * 2)).sum(-1).mean()


# name: (loss, outputs, {finding: (status, verdict, part of its words)}, the best of what is available)
Case = tuple[Callable[..., Any], Tensor, dict[str, tuple[str, str, str]], str | None]
CASES: dict[str, Case] = {
    "detached": (
        lambda y: y.detach().square().mean(),
        Y,
        {
            "gradient": ("fails", "missing", "does not depend on the outputs"),
            "func_gradient": ("fails", "missing", "zeros, without an error"),
            "hessian": ("skipped", "not looked at", ""),
        },
        None,
    ),
    "plain numpy": (
        lambda y: torch.tensor(np.square(y.detach().numpy()).mean()),
        Y,
        {"gradient": ("fails", "missing", "does not depend on the outputs")},
        None,
    ),
    "numpy without detach": (
        lambda y: torch.from_numpy(np.square(y.numpy())).mean(),
        Y,
        {"gradient": ("fails", "missing", "it leaves torch for numpy")},
        None,
    ),
    "an argument ignored": (
        lambda y: (y * 0).sum(),
        Y,
        {"gradient": ("note", "zero", "nothing to learn"), "hessian": ("note", "zero", "piecewise linear")},
        "fisher",
    ),
    "nan value": (lambda y: y.log().sum(), Y, {"evaluation": ("fails", "non-finite", "the loss is nan")}, None),
    "nan gradient": (
        lambda y: (y * 0).norm(dim=-1).sum() + (y * 0).sqrt().sum(),
        Y,
        {"gradient": ("fails", "non-finite", "NaN or infinite in 5 of 5 samples")},
        None,
    ),
    "nan Hessian": (
        lambda y: y.abs().pow(1.5).sum(-1).mean(),
        Y.clamp_min(0),
        {"gradient": ("ok", "exact", ""), "hessian": ("fails", "non-finite", "where the gradient is finite")},
        "fisher",
    ),
    "a scale detached": (
        lambda y: (y / y.detach().norm(dim=-1, keepdim=True)).square().sum(-1).mean(),
        Y,
        {"gradient": ("note", "wrong", "something is detached"), "gradient_differences": ("fails", "differs", "by ")},
        "fisher",
    ),
    "straight-through": (
        lambda y: (Rounded.apply(3 * y) - y).square().sum(-1).mean(),
        Y,
        {"gradient": ("note", "wrong", "straight-through estimator")},
        "fisher",
    ),
    # The first term's second derivative is lost, the second's is not: autograd's Hessian is a wrong one.
    "half a Hessian": (
        lambda y: (NumpyCosh.apply(y) + y.square()).sum(-1).mean(),
        Y,
        {"hessian": ("fails", "wrong", "a part of the second derivative is lost")},
        "fisher",
    ),
    # Both of torch's ways lose it: agreeing with each other makes neither right.
    "a Hessian lost by torch.func too": (
        lambda y: DetachedCube.apply(y).sum(-1).mean(),
        Y,
        {
            "func_gradient": ("ok", "exact", ""),
            "hessian": ("fails", "missing", "autograd gives zero, but the gradient does change"),
            "func_hessian": ("fails", "wrong", "differs from how the gradient changes"),
        },
        "fisher",
    ),
    "abs": (
        lambda y: y.abs().sum(-1).mean(),
        Y,
        {"hessian": ("note", "zero", "piecewise linear"), "definiteness": ("skipped", "not looked at", "no Hessian")},
        "fisher",
    ),
    "concave": (
        lambda y: -y.square().sum(-1).mean(),
        Y,
        {"definiteness": ("note", "negative semidefinite", "negative ones in 5 of 5 samples")},
        "hessian",
    ),
    "unrepeatable": (
        unrepeatable,
        Y,
        {
            "determinism": ("note", "unrepeatable", "from the same seed of torch"),
            "coupling": ("skipped", "not looked at", "unrepeatable"),
            "gradient_differences": ("skipped", "not looked at", "a second call"),
            "hessian": ("ok", "exact", "not compared with differences"),
        },
        "hessian",
    ),
    "wrong in float32": (unstable, Y, {"precision": ("fails", "wrong in float32", "gradient")}, "hessian"),
    "constants of one dtype": (
        lambda y: F.cross_entropy(y, T, weight=WEIGHT),
        Y.float(),
        {"precision": ("note", "one dtype only", "a dtype of their own"), "hessian": ("ok", "exact", "")},
        "hessian",
    ),
    "one sample": (
        lambda y: y.cosh().sum(-1).mean(),
        Y[:1],
        {"coupling": ("skipped", "not looked at", "one sample alone"), "hessian": ("ok", "exact", "")},
        "hessian",
    ),
    "m = 1": (lambda y: y.cosh().mean(), Y[:, 0], {"definiteness": ("ok", "positive definite", "")}, "hessian"),
    "unreduced": (lambda y: y.cosh().sum(-1), Y, {"func_per_sample": ("ok", "exact", "")}, "hessian"),
    "wide": (
        lambda y: y.square().sum(-1).mean(),
        torch.ones(5, 257),
        {
            "func_hessian": ("skipped", "not looked at", "1285 x 1285 entries"),
            "func_per_sample": ("skipped", "not looked at", "pass a smaller batch"),
            "cost": ("skipped", "not looked at", "257 features would take 257 products"),
        },
        "hessian",
    ),
    # Defined on [0, 1], and the outputs are at its ends: no step can be taken to either side.
    "a domain with edges": (
        lambda y: F.binary_cross_entropy(y, torch.full_like(y, 0.5)),
        torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64),
        {
            "gradient": ("ok", "exact", ""),
            "gradient_differences": ("skipped", "not looked at", "cannot be evaluated around these outputs"),
            "coupling": ("skipped", "not looked at", "cannot be evaluated around these outputs"),
        },
        "hessian",
    ),
    # Defined above 0 only, with an output of 1e-4: small steps are taken.
    "a domain with an edge near": (
        lambda y: -y.log().sum(-1).mean(),
        torch.tensor([[1e-4, 1.0], [0.5, 0.5]], dtype=torch.float64),
        {
            "gradient_differences": ("ok", "agrees", ""),
            "hessian_differences": ("ok", "agrees", ""),
            "coupling": ("ok", "independent", ""),
        },
        "hessian",
    ),
    "raises": (
        lambda y: y @ y,
        Y,
        {"evaluation": ("fails", "fails", "RuntimeError: mat1 and mat2"), "cost": ("skipped", "not looked at", "")},
        None,
    ),
    "no tensor": (lambda y: 3.0, Y, {"evaluation": ("fails", "fails", "returned a float")}, None),
    "unreduced over features": (
        lambda y: y.square(),
        Y,
        {"evaluation": ("fails", "fails", "one number or one for each of the 5 samples; its shape is (5, 3)")},
        None,
    ),
}
