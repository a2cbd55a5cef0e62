"""What is not finite, not invertible, not positive."""

from __future__ import annotations

import torch
from tests.faults.case import FISHER, HESSIAN, LOOPS, NOTHING, ONE_FALLBACK, Fault, Seen
from tests.faults.provocations import AWAKE, GOOD, LATER, bce, of_the_sum, spoiled, square, with_zero_outputs

import newton_plugin as npl

NUMBERS = (
    Fault(
        title="NaN in the outputs",
        provoked="a NaN among the inputs",
        batches=(GOOD, spoiled(float("nan")), LATER),
        sees=ONE_FALLBACK,
        intact=("plain gradient", "later steps"),
    ),
    Fault(
        title="infinity in the outputs",
        provoked="an infinity among the inputs, squared error",
        loss=square,
        batches=(GOOD, spoiled(float("inf")), LATER),
        sees=ONE_FALLBACK,
        intact=("plain gradient", "later steps"),
    ),
    Fault(
        title="the loss is NaN or infinite, its gradient is not",
        provoked="a NaN added to the loss",
        loss=lambda y, t: bce(y, t) + float("nan"),
        options=FISHER,
        sees=NOTHING,
        intact=("definition",),
    ),
    Fault(
        title="the loss overflows, and so does its gradient",
        provoked="exp(1000 + y)",
        loss=lambda y, t: torch.exp(y + (1000 if float(t.max()) > 1 else 0)).sum(-1).mean(),
        batches=(GOOD, (LATER[0], LATER[1] + 1), LATER),
        sees=ONE_FALLBACK,
        intact=("plain gradient", "later steps"),
    ),
    Fault(
        title="NaN or infinity in the gradient of a finite loss",
        provoked="sqrt at 0",
        loss=lambda y, t: y.clamp_min(0).sqrt().sum(-1).mean(),
        batches=(AWAKE, with_zero_outputs(), AWAKE),
        sees=ONE_FALLBACK,
        intact=("plain gradient", "later steps"),
    ),
    Fault(
        title="NaN or infinity in the Hessian",
        provoked="abs(y)^1.5 at 0, curvature='hessian'",
        loss=lambda y, t: y.abs().pow(1.5).sum(-1).mean(),
        batches=(AWAKE, with_zero_outputs(), AWAKE),
        options={"curvature": "hessian"},
        sees=ONE_FALLBACK,
        intact=("plain gradient", "later steps"),
    ),
    Fault(
        title="the same, fixed damping",
        provoked="abs(y)^1.5 at 0, curvature='hessian', damping=0.1",
        loss=lambda y, t: y.abs().pow(1.5).sum(-1).mean(),
        batches=(AWAKE, with_zero_outputs(), AWAKE),
        options=HESSIAN,
        sees=ONE_FALLBACK,
        intact=("plain gradient", "later steps"),
    ),
    Fault(
        title="singular C",
        provoked="a loss of the sum of three features",
        loss=of_the_sum,
        options=FISHER,
        sees=NOTHING,
        intact=("definition",),
    ),
    Fault(
        title="singular C, and a damping below rounding",
        provoked="the same, damping=1e-300",
        loss=of_the_sum,
        options={"damping": 1e-300},
        sees=ONE_FALLBACK,
        intact=("plain gradient",),
    ),
    Fault(
        title="NaN or infinity, on_nonfinite='raise'",
        provoked="an infinity among the inputs, squared error",
        loss=square,
        batches=(spoiled(float("inf")),),
        options={"on_nonfinite": "raise"},
        doors=LOOPS,
        sees=Seen(
            npl.NonFiniteError, "the gradient of the loss with respect to the outputs is not finite in 1 of 6 samples"
        ),
        intact=("no gradient",),
    ),
    Fault(
        title="singular C, on_nonfinite='raise'",
        provoked="damping=1e-300",
        loss=of_the_sum,
        options={"damping": 1e-300, "on_nonfinite": "raise"},
        doors=LOOPS,
        sees=Seen(npl.SingularCurvatureError, "C + damping * I could not be inverted with damping 1e-300"),
        intact=("no gradient",),
    ),
    Fault(
        title="C = 0: no gradient at all",
        provoked="0 * loss",
        loss=lambda y, t: 0 * square(y, t),
        sees=NOTHING,
        intact=("zero",),
    ),
    Fault(
        title="indefinite C",
        provoked="sin(y), curvature='hessian'",
        loss=lambda y, t: torch.sin(4 * y + t).sum(-1).mean(),
        options=HESSIAN,
        sees=NOTHING,
        intact=("definition", "descent"),
    ),
)
