"""Losses without a Hessian or a gradient, and outputs of unusual sizes."""

from __future__ import annotations

from tests.faults.case import FISHER, HESSIAN, NOTHING, Fault, Seen, by_door
from tests.faults.provocations import GOOD, LATER, Frozen, Net, OnlyOnce, batch, bce, coupled, detached, square

import newton_plugin as npl

LOSSES_AND_OUTPUTS = (
    Fault(
        title="a piecewise linear loss",
        provoked="absolute error, curvature='hessian'",
        loss=lambda y, t: (y - t).abs().sum(-1).mean(),
        batches=(GOOD, LATER),
        options=HESSIAN,
        sees=Seen(
            message="the Hessian is zero at these outputs, as that of a piecewise linear loss", warns=True, fallbacks=2
        ),
        intact=("fisher",),
    ),
    Fault(
        title="a loss that is not twice differentiable",
        provoked="a backward marked once_differentiable, curvature='hessian'",
        loss=lambda y, t: (OnlyOnce.apply(y) - t * y).sum(-1).mean(),
        batches=(GOOD, LATER),
        options=HESSIAN,
        sees=Seen(message="differentiable only once", warns=True, fallbacks=2),
        intact=("fisher",),
    ),
    Fault(
        title="a loss that couples the samples, curvature='hessian'",
        provoked="InfoNCE",
        loss=coupled,
        options=HESSIAN,
        sees=Seen(npl.BatchCoupledError, "the loss couples the samples of a batch"),
        intact=("no gradient",),
    ),
    Fault(
        title="a loss that couples the samples, curvature='auto'",
        provoked="InfoNCE",
        loss=coupled,
        batches=(GOOD, LATER),
        options={"curvature": "auto", "damping": 0.1},
        sees=NOTHING,
        intact=("fisher",),
    ),
    Fault(
        title="a detached loss",
        provoked="the outputs are detached inside the loss",
        loss=detached,
        sees=by_door(
            newton_loss=Seen(
                npl.NoGradientError, "returned a value without an autograd graph. Does it detach its outputs"
            ),
            hooked=Seen(
                npl.NoGradientError, "loss has no autograd graph: it was detached, computed under torch.no_grad()"
            ),
        ),
        intact=("no gradient",),
    ),
    Fault(
        title="a frozen model",
        provoked="requires_grad_(False) on everything",
        model=Frozen,
        sees=by_door(
            newton_loss=Seen(
                npl.NoGradientError, "does not require grad: it was detached, computed under torch.no_grad()"
            ),
            hooked=Seen(npl.NoGradientError, "or every parameter is frozen"),
        ),
        intact=("no gradient",),
    ),
    Fault(
        title="an empty batch",
        provoked="no samples between two good batches",
        loss=square,
        batches=(GOOD, (GOOD[0][:0], GOOD[1][:0]), LATER),
        sees=NOTHING,
        intact=("zero", "later steps"),
    ),
    Fault(
        title="a single sample",
        provoked="a batch of one, Fisher",
        batches=(batch(1),),
        options=FISHER,
        sees=NOTHING,
        intact=("definition",),
    ),
    Fault(
        title="a single sample, curvature='hessian'",
        provoked="a batch of one",
        batches=(batch(1),),
        options=HESSIAN,
        sees=NOTHING,
        intact=("definition",),
    ),
    Fault(
        title="one feature (m = 1)",
        provoked="a head with one output",
        model=lambda: Net(1),
        loss=lambda y, t: bce(y, t[:, :1]),
        options=HESSIAN,
        sees=NOTHING,
        intact=("definition",),
    ),
    Fault(
        title="m too large for a dense C",
        provoked="20,000 outputs, curvature='hessian', structure='block'",
        model=lambda: Net(20_000),
        loss=lambda y, t: y.cosh().sum(-1).mean(),
        options={**HESSIAN, "structure": "block"},
        sees=Seen(
            npl.OutputsTooLargeError,
            "outputs of 20000 features (N = 6) needs a dense C of 3.0 GiB, more than the limit of 2 GiB. Use "
            "structure='mean' or 'diagonal'",
        ),
        intact=("no gradient",),
    ),
    Fault(
        title="float16 overflow",
        provoked="scale of a GradScaler too large: an infinite scaled gradient",
        sees=NOTHING,
        intact=("scaler",),
    ),
)
