"""Losses without a Hessian or a gradient, and outputs of unusual sizes."""

from __future__ import annotations

from tests.faults.case import FISHER, HESSIAN, NOTHING, Fault, Seen, by_door
from tests.faults.provocations import GOOD, LATER, Frozen, Net, OnlyOnce, batch, bce, coupled, detached, square

import newton_plugin as npl

LOSSES_AND_OUTPUTS = (
    Fault(
        "a piecewise linear loss",
        "absolute error, curvature='hessian'",
        Seen(
            message="the Hessian is zero at these outputs, as that of a piecewise linear loss", warns=True, fallbacks=2
        ),
        ("fisher",),
        lambda y, t: (y - t).abs().sum(-1).mean(),
        (GOOD, LATER),
        HESSIAN,
    ),
    Fault(
        "a loss that is not twice differentiable",
        "a backward marked once_differentiable, curvature='hessian'",
        Seen(message="differentiable only once", warns=True, fallbacks=2),
        ("fisher",),
        lambda y, t: (OnlyOnce.apply(y) - t * y).sum(-1).mean(),
        (GOOD, LATER),
        HESSIAN,
    ),
    Fault(
        "a loss that couples the samples, curvature='hessian'",
        "InfoNCE",
        Seen(npl.BatchCoupledError, "the loss couples the samples of a batch"),
        ("no gradient",),
        coupled,
        options=HESSIAN,
    ),
    Fault(
        "a loss that couples the samples, curvature='auto'",
        "InfoNCE",
        Seen(message="the loss couples the samples of a batch", warns=True, fallbacks=2),
        ("fisher",),
        coupled,
        (GOOD, LATER),
        {"curvature": "auto", "damping": 0.1},
    ),
    Fault(
        "a detached loss",
        "the outputs are detached inside the loss",
        by_door(
            Seen(npl.NoGradientError, "returned a value without an autograd graph. Does it detach its outputs"),
            Seen(npl.NoGradientError, "loss has no autograd graph: it was detached, computed under torch.no_grad()"),
        ),
        ("no gradient",),
        detached,
    ),
    Fault(
        "a frozen model",
        "requires_grad_(False) on everything",
        by_door(
            Seen(npl.NoGradientError, "does not require grad: it was detached, computed under torch.no_grad()"),
            Seen(npl.NoGradientError, "or every parameter is frozen"),
        ),
        ("no gradient",),
        model=Frozen,
    ),
    Fault(
        "an empty batch",
        "no samples between two good batches",
        NOTHING,
        ("zero", "later steps"),
        square,
        (GOOD, (GOOD[0][:0], GOOD[1][:0]), LATER),
    ),
    Fault("a single sample", "a batch of one, Fisher", NOTHING, ("definition",), batches=(batch(1),), options=FISHER),
    Fault(
        "a single sample, curvature='hessian'",
        "a batch of one",
        NOTHING,
        ("definition",),
        batches=(batch(1),),
        options=HESSIAN,
    ),
    Fault(
        "one feature (m = 1)",
        "a head with one output",
        NOTHING,
        ("definition",),
        lambda y, t: bce(y, t[:, :1]),
        options=HESSIAN,
        model=lambda: Net(1),
    ),
    Fault(
        "m too large for a dense C",
        "20,000 outputs, curvature='hessian', structure='block'",
        Seen(
            npl.OutputsTooLargeError,
            "outputs of 20000 features (N = 6) needs a dense C of 3.0 GiB, more than the limit of 2 GiB. Use "
            "structure='mean' or 'diagonal'",
        ),
        ("no gradient",),
        lambda y, t: y.cosh().sum(-1).mean(),
        options={**HESSIAN, "structure": "block"},
        model=lambda: Net(20_000),
    ),
    Fault(
        "m large, curvature='auto'",
        "300 outputs",
        Seen(message="300 features would take 300 Hessian-vector products a step", warns=True, fallbacks=2),
        ("fisher",),
        lambda y, t: y.cosh().sum(-1).mean(),
        (GOOD, LATER),
        {"curvature": "auto", "damping": 0.1},
        lambda: Net(300),
    ),
    Fault(
        "float16 overflow",
        "scale of a GradScaler too large: an infinite scaled gradient",
        NOTHING,
        ("scaler",),
    ),
)
